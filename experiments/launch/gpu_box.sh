#!/usr/bin/env bash
# Trains on one machine, on all of its GPUs, and goes on after an interruption.
#
#   experiments/launch/gpu_box.sh --config=FILE --workdir=FOLDER [flags of train]
#
# Run it from the repository's root. A run that a SIGTERM stopped has saved and
# exits 143: it is started again, at most MAX_RESTARTS times in all (default
# 100). Any other exit code ends the script with that code, and so does a
# SIGTERM or Ctrl-C to the script itself, once the run has saved.
#
# PROCESSES=8 gives each of 8 GPUs a process of its own: the first 8 of
# CUDA_VISIBLE_DEVICES, where that is set (set to nothing, it hides all of them
# from all processes). By default one process drives all GPUs. PORT (default 12355) is where they meet; of several, all end
# within GRACE seconds (default 60) once one of them fails. PYTHON names the
# interpreter. Needs bash 5.1.
set -uo pipefail

processes=${PROCESSES:-1}
port=${PORT:-12355}
left=${MAX_RESTARTS:-100}
grace=${GRACE:-60}
python=${PYTHON:-python}
stopped=0
children=()
gpus=()

if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
  IFS=", " read -r -a gpus <<<"$CUDA_VISIBLE_DEVICES"
  if ((processes > 1 && ${#gpus[@]} < processes)); then
    echo "error: PROCESSES=$processes, but CUDA_VISIBLE_DEVICES names\
 ${#gpus[@]} GPU(s): $CUDA_VISIBLE_DEVICES; name more, or start fewer" >&2
    exit 2
  fi
elif [[ -z ${CUDA_VISIBLE_DEVICES+set} ]]; then
  # All GPUs, in their order.
  mapfile -t gpus < <(seq 0 $((processes - 1)))
fi

pass_on() {
  stopped=1
  kill -TERM "${children[@]}" 2>/dev/null
}
trap pass_on TERM INT

# Ends what is left of a run that failed: the others wait in a collective.
end_all() {
  local second
  kill -TERM "${children[@]}" 2>/dev/null
  for ((second = 0; second < grace; second++)); do
    kill -0 "${children[@]}" 2>/dev/null || return
    sleep 1
  done
  kill -KILL "${children[@]}" 2>/dev/null
}

# Starts all processes, waits for them, returns the first code that is not 0.
run_once() {
  local index code ended worst=0
  children=()
  for ((index = 0; index < processes; index++)); do
    if ((processes == 1)); then
      "$python" -m cacovid_jax.train "$@" &
    else
      CUDA_VISIBLE_DEVICES=${gpus[index]:-} "$python" -m cacovid_jax.train "$@" \
        --coordinator="localhost:$port" --num_processes="$processes" \
        --process_id="$index" &
    fi
    children+=($!)
  done
  while ((${#children[@]})); do
    wait -n -p ended "${children[@]}"
    code=$?
    if [[ -z ${ended:-} ]]; then
      # A signal ended the wait and no process; or bash has seen one end while
      # it did something else, and tells only who asks for that one.
      ((code == 127)) || continue
      ended=${children[*]:0:1}
      wait "$ended"
      code=$?
    fi
    for index in "${!children[@]}"; do
      [[ ${children[index]} != "$ended" ]] || unset "children[index]"
    done
    if ((code != 0 && worst == 0)); then
      worst=$code
      # Those that were stopped and save go on saving.
      ((code == 143 || ${#children[@]} == 0)) || end_all
    fi
  done
  return "$worst"
}

while true; do
  run_once "$@"
  code=$?
  if ((code != 143 || stopped || left == 0)); then
    exit "$code"
  fi
  left=$((left - 1))
  echo "stopped and saved (exit 143): starting again" >&2
done
