#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU slice, one process on each.
#
#   experiments/launch/tpu_pod.sh NAME ZONE --config=FILE --workdir=FOLDER \
#       [flags of train]
#
# Run it where gcloud is signed in. The repository must be installed on every
# host in FOLDER (default cacovid_jax, below the home folder), and the workdir
# must be a folder that all hosts see. Runs the same script there with `worker`
# in place of name and zone, which finds its number and the other hosts in
# TPU_WORKER_ID and TPU_WORKER_HOSTNAMES or, where they are not set, asks the
# machine's metadata. A slice that was preempted is made anew by its owner; the
# same command then continues the run. PYTHON names the interpreter there; PORT
# (default 8476) is where they meet.
set -euo pipefail

usage="usage: tpu_pod.sh NAME ZONE --config=FILE --workdir=FOLDER [flags]"
port=${PORT:-8476}

metadata() {
  curl --silent --fail --max-time 10 --header "Metadata-Flavor: Google" \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

if [[ ${1:-} == worker ]]; then
  shift
  number=${TPU_WORKER_ID:-$(metadata agent-worker-number)}
  if [[ -n ${TPU_WORKER_HOSTNAMES:-} ]]; then
    IFS=, read -r -a hosts <<<"$TPU_WORKER_HOSTNAMES"
  else
    # Entries are ID:ID:ADDRESS.
    IFS=, read -r -a hosts <<<"$(metadata worker-network-endpoints)"
    hosts=("${hosts[@]##*:}")
  fi
  flags=()
  if ((${#hosts[@]} > 1)); then
    flags=(--coordinator="${hosts[0]}:$port" --num_processes="${#hosts[@]}"
      --process_id="$number")
  fi
  exec "${PYTHON:-python3}" -m cacovid_jax.train "$@" "${flags[@]}"
fi

if (($# < 3)) || [[ $1 == -* || $2 == -* ]]; then
  echo "error: $usage" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
# Quoted twice: the flags pass through the shell of each host.
printf -v flags " %q" "$@"
printf -v folder "%q" "${FOLDER:-cacovid_jax}"
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd $folder && PYTHON=${PYTHON:-python3} PORT=$port \
experiments/launch/tpu_pod.sh worker$flags"
