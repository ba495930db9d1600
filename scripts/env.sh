#!/usr/bin/env bash
# The one shared environment of all scripts: a virtual environment in .venv at the repository's root.
#
#   source scripts/env.sh [EXTRA...]    in a script: sets .venv up where needed, puts it first on PATH
#   bash scripts/env.sh [EXTRA...]      the same as a command, for instance to add an extra
#   bash scripts/env.sh --find-python   prints the Python that a new .venv would be made from
#
# EXTRA is one of setup.py's extras. A finished .venv is reused until setup.py, constraints.txt, its
# Python, the torch index or the repository's place changes; an interrupted one is built anew.
# .venv may be a link to an empty folder, say on another disk, and is then made there. Nothing is
# deleted through a link.
#
# Settings:
#   SFT_PYTHON        the Python (>= 3.12) to make .venv from, instead of looking for one
#   SFT_EXTRAS        further extras, separated by commas
#   TORCH_INDEX_URL   package index to take torch from; .venv remembers it (empty: the default index)

_sft_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
_sft_venv="$_sft_root/.venv"

# Prints what a finished .venv was made from, or fails when .venv has no working Python.
_sft_key() {
    local version digest index
    version="$("$_sft_venv/bin/python" -ISc 'import sys; print(sys.version)' 2>/dev/null)" || return 1
    index="${TORCH_INDEX_URL-$(cat "$_sft_venv/.sft-torch-index" 2>/dev/null)}"
    digest="sha256sum"
    command -v sha256sum >/dev/null || digest="shasum -a 256"
    {
        printf '%s\n' "$_sft_root" "$version" "$index"
        cat "$_sft_root/setup.py" "$_sft_root/constraints.txt"
    } | $digest | cut -d ' ' -f 1
}

# Succeeds when .venv is finished, unchanged and holds all extras named.
_sft_ready() {
    local key extras extra
    [[ -f $_sft_venv/.sft-stamp && ! -e $_sft_venv/.sft-unfinished ]] || return 1
    { read -r key && read -r extras; } <"$_sft_venv/.sft-stamp" || return 1
    for extra in "$@"; do
        [[ ",$extras," == *",$extra,"* ]] || return 1
    done
    [[ $key == "$(_sft_key)" ]]
}

# Everything below this function runs in a process of its own, with its own error handling.
_sft_env() {
    local -a extras
    IFS=', ' read -r -a extras <<<"$* ${SFT_EXTRAS:-}"
    _sft_ready "${extras[@]}" || bash "$_sft_root/scripts/env.sh" --install "${extras[@]}" </dev/null || return 1
    export VIRTUAL_ENV="$_sft_venv"
    [[ $PATH == "$_sft_venv/bin:"* ]] || export PATH="$_sft_venv/bin:$PATH"
    unset PYTHONHOME
}

if [[ ${BASH_SOURCE[0]} != "$0" ]]; then
    _sft_env "$@" || return 1
    unset -f _sft_key _sft_ready _sft_env
    unset _sft_root _sft_venv
    return 0
fi

set -euo pipefail

say() { echo "env: $*" >&2; }

die() {
    say "error: $1"
    shift
    (($# == 0)) || printf '  %s\n' "$@" >&2
    exit 1
}

# Prints "VERSION HAS_VENV EXECUTABLE" of one candidate; fails when it does not run or is older than 3.12.
# Of a virtual environment it names the Python beneath: the one on PATH may be the .venv to be replaced.
probe_python() {
    local line
    line="$("$1" -Ic '
import sys
if sys.version_info < (3, 12):
    sys.exit(1)
try:
    import ensurepip, venv
    has_venv = "yes"
except ImportError:
    has_venv = "no"
print("%d.%d" % sys.version_info[:2], has_venv, sys._base_executable)' 2>/dev/null </dev/null)" || return 1
    [[ $line == 3.* ]] || return 1
    echo "$line"
}

# Prints candidates, one a line, nearest first.
list_pythons() {
    local name folder
    for name in python3.12 python3.13 python3.14 python3 python; do
        type -aP "$name" || true
    done
    for folder in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv"; do
        if [[ -d $folder/versions ]]; then
            printf '%s\n' "$folder"/versions/3.*/bin/python3 | sort -rV
        fi
    done
    if command -v uv >/dev/null; then
        UV_PYTHON_DOWNLOADS=never uv python find 3.12 2>/dev/null || true
        UV_PYTHON_DOWNLOADS=never uv python find '>=3.12' 2>/dev/null || true
    fi
}

# Prints the nearest 3.12 (the version tested with), else the oldest newer one, as "HAS_VENV EXECUTABLE".
choose_python() {
    local candidate version has_venv executable newer="" newer_version="" bare=""
    while IFS= read -r candidate; do
        read -r version has_venv executable < <(probe_python "$candidate") || continue
        if [[ $has_venv == no ]] && ! command -v uv >/dev/null; then
            bare="${bare:-no $executable}"
        elif [[ $version == 3.12 ]]; then
            echo "$has_venv $executable"
            return
        elif [[ -z $newer || ${version#3.} -lt ${newer_version#3.} ]]; then
            newer="$has_venv $executable"
            newer_version="$version"
        fi
    done < <(list_pythons)
    echo "${newer:-$bare}"
}

# Prints "HAS_VENV EXECUTABLE" of the Python to use, or says what to install and exits.
find_python() {
    local found
    if [[ -n ${SFT_PYTHON:-} ]]; then
        found="$(probe_python "$SFT_PYTHON")" ||
            die "SFT_PYTHON=$SFT_PYTHON is not a working Python >= 3.12." \
                "Name another one, or unset SFT_PYTHON to look for one."
        found="${found#* }"
    else
        found="$(choose_python)"
        if [[ -z $found ]] && command -v uv >/dev/null; then
            say "no Python >= 3.12 found: uv installs one"
            uv python install --quiet 3.12 >&2 || true
            found="$(choose_python)"
        fi
    fi
    if [[ -z $found ]]; then
        die "Python 3.12 or newer is needed and none was found on PATH, among pyenv's versions or through uv." \
            "Install it in one of these ways, then run the same command again:" \
            "  Ubuntu >= 24.04, Debian >= 13:  sudo apt-get install python3 python3-venv" \
            "  Fedora, RHEL >= 9:              sudo dnf install python3.12" \
            "  with pyenv:                     pyenv install 3.12" \
            "  with uv:                        uv python install 3.12" \
            "One that lies elsewhere can be named: SFT_PYTHON=/path/to/python3.12"
    elif [[ $found == "no "* ]] && ! command -v uv >/dev/null; then
        die "${found#* } is new enough but has no module to make virtual environments." \
            "Install it (Ubuntu, Debian: sudo apt-get install python3-venv) and run the same command again."
    fi
    echo "$found"
}

# Runs pip, keeps its output in .venv/install.log, shows the large steps, and the end of the log on failure.
pip_install() {
    local log="$_sft_venv/install.log" large='^ *(Downloading|Using cached) ([^ ]+) \(([0-9.]+ GB|[0-9]{3,}(\.[0-9]+)? MB)\)'
    : >"$log"
    PIP_USER=0 "$_sft_venv/bin/python" -m pip install --no-input --disable-pip-version-check \
        --progress-bar off "$@" 2>&1 </dev/null |
        while IFS= read -r line; do
            printf '%s\n' "$line" >>"$log"
            if [[ $line =~ $large ]]; then
                say "  ${BASH_REMATCH[1]} ${BASH_REMATCH[2]} (${BASH_REMATCH[3]})"
            elif [[ $line == "Installing collected packages: "* ]]; then
                say "  unpacking $(wc -w <<<"${line#*: }" | tr -d ' ') packages"
            fi
        done
}

# The same, ending the set-up on failure. Where pip had not begun to unpack, .venv is as before.
pip_install_or_die() {
    pip_install "$@" && return
    tail -n 15 "$_sft_venv/install.log" >&2
    grep -q '^Installing collected packages' "$_sft_venv/install.log" || rm -f "$_sft_venv/.sft-unfinished"
    die "pip could not install the packages; its whole output is in .venv/install.log." \
        "Mend the cause (network, package index, disk space) and run the same command again."
}

# Succeeds when a folder is there and holds anything.
has_content() {
    [[ -d $1 && -n "$(find "$1/" -mindepth 1 -maxdepth 1)" ]]
}

# Goes on with the folder behind the link .venv, if it is empty or the environment of this repository.
follow_link() {
    local folder owner
    folder="$(cd -P "$_sft_venv" 2>/dev/null && pwd)" ||
        die ".venv is a link to a folder that is not there: make the folder, or remove the link."
    owner="$(cat "$folder/.sft-root" 2>/dev/null || true)"
    if has_content "$folder" && [[ $owner != "$_sft_root" ]]; then
        owner="${owner:+the environment of $owner}"
        die ".venv is a link to $folder, ${owner:-which is not empty and was not made here}: remove the link."
    fi
    _sft_venv="$folder" # Python's venv refuses a link
}

make_venv() {
    local has_venv executable found
    found="$(find_python)"
    read -r has_venv executable <<<"$found"
    say "making .venv with $executable"
    mkdir -p "$_sft_venv"
    # Empties the folder rather than removing it: a disk may be mounted there.
    find "$_sft_venv/" -mindepth 1 -delete
    printf '%s' "$_sft_root" >"$_sft_venv/.sft-root"
    : >"$_sft_venv/.sft-unfinished"
    if [[ $has_venv == yes ]]; then
        "$executable" -m venv "$_sft_venv"
    else
        uv venv --quiet --seed --allow-existing --python "$executable" "$_sft_venv"
    fi
}

install() {
    local key constraints="constraints.txt" index stamped="" extras reason="" size="" version pin range
    local linked=""
    cd "$_sft_root"
    trap 'exit 130' INT
    trap 'exit 143' TERM
    exec 9>"$_sft_root/.venv.lock"
    if command -v flock >/dev/null && ! flock -n 9; then
        say "waiting for another set-up of .venv to end"
        flock 9
    fi
    _sft_ready "$@" && return
    if [[ -L $_sft_venv ]]; then
        linked=yes
        follow_link
    fi

    index="$(cat "$_sft_venv/.sft-torch-index" 2>/dev/null || true)"
    if [[ -e $_sft_venv/.sft-unfinished ]]; then
        reason="its last set-up was interrupted"
    elif has_content "$_sft_venv" && ! { probe_python "$_sft_venv/bin/python" &&
        "$_sft_venv/bin/python" -m pip --version; } >/dev/null 2>&1; then
        reason="it has no working Python >= 3.12 with pip"
    elif [[ -f $_sft_venv/.sft-root && $(<"$_sft_venv/.sft-root") != "$_sft_root" ]]; then
        reason="the repository has moved"
    elif has_content "$_sft_venv" && [[ ${TORCH_INDEX_URL-$index} != "$index" ]]; then
        reason="TORCH_INDEX_URL has changed"
    fi
    if [[ -n $reason && -n $linked ]]; then
        die ".venv must be built anew ($reason), but it is a link: empty $_sft_venv and run the same command again."
    fi
    index="${TORCH_INDEX_URL-$index}"
    if [[ -n $reason ]]; then
        say "building .venv anew: $reason"
    elif [[ -f $_sft_venv/.sft-stamp ]]; then
        # Extras once asked for stay, so that test.sh and quickstart.sh do not undo each other.
        stamped="$(sed -n 2p "$_sft_venv/.sft-stamp")"
    fi
    extras="$(printf '%s\n' "${stamped//,/$'\n'}" "$@" | sort -u | sed '/^$/d' | paste -sd, -)"
    if [[ -n $reason ]] || ! has_content "$_sft_venv"; then
        make_venv
        [[ -n $index ]] || size=" (about 6 GB on disk, some minutes)"
    else
        say "bringing .venv up to date"
        : >"$_sft_venv/.sft-unfinished"
        rm -f "$_sft_venv/.sft-stamp"
    fi
    printf '%s' "$_sft_root" >"$_sft_venv/.sft-root"
    (umask 077 && printf '%s' "$index" >"$_sft_venv/.sft-torch-index")

    if [[ -n $index ]]; then
        pin="$(grep -E '^torch==' constraints.txt)"
        range="$(sed -nE 's/^ *"(torch[<>=][^"]*)".*/\1/p' setup.py)"
        say "installing torch from TORCH_INDEX_URL"
        if ! pip_install "$pin" --index-url "$index"; then
            say "no $pin there: taking any $range"
            pip_install_or_die "$range" --index-url "$index"
        fi
        # Another build of torch comes with other CUDA libraries, so their exact versions do not hold.
        version="$("$_sft_venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))')"
        constraints="$_sft_venv/constraints.txt"
        grep -vE '^(torch|triton|cuda-[a-z]+|nvidia-(cu|nccl|nvjitlink|nvshmem|nvtx)[a-z0-9-]*)==' \
            constraints.txt >"$constraints"
        echo "torch==$version" >>"$constraints"
    fi
    say "installing the packages${extras:+ with extras $extras}$size; log: .venv/install.log"
    pip_install_or_die -c "$constraints" -e ".${extras:+[$extras]}"

    # The stamp is written last and appears whole: without it .venv does not count as finished.
    key="$(_sft_key)"
    printf '%s\n%s\n' "$key" "$extras" >"$_sft_venv/.sft-stamp.new"
    mv "$_sft_venv/.sft-stamp.new" "$_sft_venv/.sft-stamp"
    rm -f "$_sft_venv/.sft-unfinished"
    say ".venv is ready"
}

case "${1:-}" in
--install)
    shift
    install "$@"
    ;;
--find-python)
    found="$(find_python)"
    echo "${found#* }"
    ;;
-*)
    die "unknown option $1" "usage: bash scripts/env.sh [EXTRA...] | --find-python"
    ;;
*)
    _sft_env "$@"
    ;;
esac
