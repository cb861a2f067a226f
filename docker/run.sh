#!/usr/bin/env bash
# Serve a checkpoint in one of DJLServing's images. Where no Docker engine is, only tell how.
set -euo pipefail

usage() {
  cat >&2 <<TEXT
usage: docker/run.sh IMAGE [MODEL [OPTIONS OF docker run]]

IMAGE  lmi, djl-cpu (or cpu), pytorch-gpu or fastertransformer
MODEL  a checkpoint's folder, or a model id or s3:// address; without it the demo

PORT=8080 HOST=127.0.0.1  where it listens on this host
GPUS=all SHM_SIZE=12g     what of the GPUs and of shared memory (NCCL) it gets
Properties are variables: -e OPTION_DTYPE=bf16

Exit status 3: there is no Docker engine; what would have run is on standard output.
TEXT
  exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
(($#)) || usage
image=$1
shift
[[ $image == cpu ]] && image=djl-cpu
file=$root/docker/$image.Dockerfile
[[ -f $file ]] || usage
model=$root/examples/demo/model
if (($#)); then
  model=$1
  shift
fi

tag=djl-t5-handler:$image
build=(docker build --tag "$tag" --file "$file" "$root")
run=(docker run --rm --publish "${HOST:-127.0.0.1}:${PORT:-8080}:8080")
if [[ $image != djl-cpu ]]; then
  run+=(--gpus "${GPUS:-all}" --shm-size "${SHM_SIZE:-12g}")
fi
if [[ -d $model ]]; then
  access=ro
  # the wheel writes the converted weights beside the checkpoint
  [[ $image == fastertransformer ]] && access=rw
  run+=(--volume "$(cd "$model" && pwd):/opt/ml/checkpoint:$access")
else
  run+=(--env "OPTION_MODEL_ID=$model")
fi
run+=("$@" "$tag")

if ! docker info >/dev/null 2>&1; then
  echo "no Docker engine answers here; where there is one, run" >&2
  printf '%q ' "${build[@]}" && echo
  printf '%q ' "${run[@]}" && echo
  exit 3
fi
"${build[@]}"
exec "${run[@]}"
