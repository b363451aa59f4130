#!/usr/bin/env bash
# shellcheck disable=SC2034 # what functions find, others read
# The TPUs and GPUs that Google Cloud has, by the names that `python -m dydilit_jax.compile` takes too:
# v5e:16x16 is a slice of 256 chips. Sourced, not run. From Google Cloud's pages "TPU v4" to "TPU7x",
# "Plan TPUs in GKE" and "GPU machine types".

# GENERATION:dimensions:name of a queued resource's accelerator:what its number counts:runtime:label in GKE
# The number counts TensorCores (2 a chip) where Google Cloud's does; "-" where queued resources have none.
TPU_GENERATIONS="v4:3:v4:2:tpu-ubuntu2204-base:tpu-v4-podslice
v5e:2:v5litepod:1:v2-alpha-tpuv5-lite:tpu-v5-lite-podslice
v5p:3:v5p:2:v2-alpha-tpuv5:tpu-v5p-slice
v6e:2:v6e:1:v2-alpha-tpuv6e:tpu-v6e-slice
tpu7x:3:-:-:-:tpu7x"
# Slices of the 2D generations; a slice within one host has up to 8 chips.
TPU_2D="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
TPU_3D_SMALL="2x2x1 2x2x2 2x2x4 2x4x4" # above, every edge is a multiple of 4
GPU_NAMES="nvidia-tesla-t4 nvidia-tesla-v100 nvidia-l4 nvidia-tesla-a100 nvidia-a100-80gb nvidia-h100-80gb
nvidia-h100-mega-80gb nvidia-h200-141gb nvidia-b200 nvidia-gb200"

# tpu_slice TOPOLOGY (like v5e:16x16): `chips`, `hosts` and `chips_per_host` of a slice, its `shape`,
# `queued_type` (empty where there is none), `runtime` and `tpu_label`.
tpu_slice() {
  local generation=${1%%:*} row dimensions name unit known=""
  shape=${1#*:}
  while IFS=: read -r row dimensions name unit runtime tpu_label; do
    known+=" $row"
    [[ $row != "$generation" ]] || break
    row=""
  done <<<"$TPU_GENERATIONS"
  [[ -n $row && $1 == *:* ]] ||
    die "unknown accelerator type '$1': it has the form GENERATION:SHAPE, like v5e:16x16. Known generations:$known"
  chips=1
  local edge edges
  [[ $shape =~ ^[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}$ ]] || die "unknown slice '$1': a shape is like 16x16 or 4x4x8"
  IFS=x read -ra edges <<<"$shape"
  for edge in "${edges[@]}"; do chips=$((chips * edge)); done
  if ((dimensions == 2)); then
    [[ " $TPU_2D " == *" $shape "* ]] || die "there is no slice '$1'. Slices of $generation: $TPU_2D"
  elif [[ " $TPU_3D_SMALL " != *" $shape "* ]]; then
    local least=4
    for edge in "${edges[@]}"; do
      ((edge % 4 == 0 && edge >= least)) || edges=()
      least=$edge
    done
    ((${#edges[@]} == 3)) ||
      die "there is no slice '$1'. Slices of $generation: $TPU_3D_SMALL, and above AxBxC of multiples of 4 with A <= B <= C"
  fi
  chips_per_host=4
  ((dimensions == 3 || chips > 8)) || chips_per_host=$chips
  hosts=$((chips / chips_per_host))
  queued_type=""
  [[ $name == - ]] || queued_type=$name-$((chips * unit))
}

# cubic_shape CHIPS: `cubic` is the slice AxBxC nearest to a cube that has so many chips: the one that a
# queued resource of v5p is, whose type tells only how many.
cubic_shape() {
  local a b c shape_3d least=$(($1 + 3))
  cubic=""
  for shape_3d in $TPU_3D_SMALL; do
    IFS=x read -r a b c <<<"$shape_3d"
    ((a * b * c != $1)) || cubic=$shape_3d
  done
  [[ -z $cubic ]] || return 0
  for ((a = 4; a * a * a <= $1; a += 4)); do
    for ((b = a; a * b * b <= $1; b += 4)); do
      c=$(($1 / (a * b)))
      if ((a * b * c == $1 && c % 4 == 0 && a + b + c < least)); then
        least=$((a + b + c)) cubic=${a}x${b}x$c
      fi
    done
  done
}

gpu_name() {
  [[ " ${GPU_NAMES//$'\n'/ } " == *" $1 "* ]] ||
    die "unknown accelerator type '$1'. Known GPUs: ${GPU_NAMES//$'\n'/ }"
}
