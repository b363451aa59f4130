# For NVIDIA GPU hosts (launch/gke.sh, slurm.sh, host.sh --image). From the root of a checkout:
#     docker build --file launch/docker/gpu.Dockerfile --tag REGISTRY/dydilit-jax:gpu . && docker push REGISTRY/dydilit-jax:gpu
# CUDA, cuDNN and NCCL come with jax's own wheels; the host brings the driver (CUDA 13: 580 or newer).
FROM python:3.12-slim-bookworm

# tini passes SIGTERM on to the program, which saves; python alone, as process 1, would not be ended by it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*

# Requirements first: a change of the code does not install them anew.
WORKDIR /opt/dydilit_jax
COPY requirements.txt .
RUN pip install --no-cache-dir --requirement requirements.txt "jax[cuda13]>=0.10.2,<0.13"

COPY . .
ENV PYTHONPATH=/opt/dydilit_jax PYTHONUNBUFFERED=1
# What NVIDIA's own images say: what its container toolkit is to bring in, and where GKE mounts the driver.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENV PATH=/usr/local/nvidia/bin:$PATH LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64
# Any user may run it (docker run --user), also one without a home.
ENV MPLCONFIGDIR=/tmp/matplotlib

ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["python", "-m", "dydilit_jax.train", "--help"]
