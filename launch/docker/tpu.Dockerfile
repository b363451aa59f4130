# For TPU hosts (launch/gke.sh, launch/tpu.sh --image). From the root of a checkout:
#     docker build --file launch/docker/tpu.Dockerfile --tag REGISTRY/dydilit-jax:tpu . && docker push REGISTRY/dydilit-jax:tpu
FROM python:3.12-slim-bookworm

# tini passes SIGTERM on to the program, which saves; python alone, as process 1, would not be ended by it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*

# Requirements first: a change of the code does not install them anew.
WORKDIR /opt/dydilit_jax
COPY requirements.txt .
RUN pip install --no-cache-dir --requirement requirements.txt "jax[tpu]>=0.10.2,<0.13"

COPY . .
ENV PYTHONPATH=/opt/dydilit_jax PYTHONUNBUFFERED=1
# Any user may run it (docker run --user), also one without a home.
ENV MPLCONFIGDIR=/tmp/matplotlib

ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["python", "-m", "dydilit_jax.train", "--help"]
