#!/usr/bin/env bash
# From a bare Debian or Ubuntu to an environment that runs the pipeline. `--help` says what it takes.
set -euo pipefail

# Newest first. torch 2.13 is built for these CUDA versions; the first one is what requirements.lock resolves to.
TORCH_BUILDS=(13.0 12.6)
TORCH_INDEXES=https://download.pytorch.org/whl
TOOLKITS=(13.0 12.8 12.6)
UNKNOWN_CUDA=12.8
TOOLKIT_REPOSITORY=https://developer.download.nvidia.com/compute/cuda/repos
PACKAGES=(ca-certificates curl gcc git make)

usage() {
  cat <<EOF
usage: setup/bootstrap.sh [OPTION ...]

Makes this machine ready: system packages, CUDA toolkit, and a virtual environment with the torch build that the
NVIDIA driver runs. What is there already is left as it is. The log goes to logs/bootstrap_<timestamp>.log; the last
line printed activates the environment.

  --system auto|none             install missing Debian packages with apt-get (default: auto)
  --cuda-toolkit auto|none|X.Y   install NVIDIA's toolkit, whose profilers the pipeline can use (default: auto, the
                                 driver's version; $UNKNOWN_CUDA where that is unknown; none without a GPU)
  --python-env PATH              the virtual environment (default: .venv)
  --lock FILE                    the pinned packages (default: requirements.lock)
  --dry-run                      print what would be done, do nothing
  --help                         print this

environment:
  SKIP_SYSTEM_PACKAGES=1         the same as --system none
  SKIP_CUDA_TOOLKIT=1            the same as --cuda-toolkit none
  TORCH_INDEX_URL                take torch from this index: $TORCH_INDEXES/cpu needs no GPU
EOF
}

say() { printf '%-13s %s\n' "$1" "$2"; }
warn() { printf 'warning: %s\n' "$*" >&2; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}
run() {
  printf '+ %s\n' "$*"
  ((dry)) || "$@"
}
as_root() {
  if [[ $(id -u) == 0 ]]; then
    run "$@"
  elif ((dry)) || command -v sudo >/dev/null; then
    run sudo "$@"
  else
    fail "apt-get needs root and sudo is not here: run as root, or set SKIP_SYSTEM_PACKAGES=1 and SKIP_CUDA_TOOLKIT=1"
  fi
}
# newer A B: whether version A is B or newer.
newer() { [[ $(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1) == "$2" ]]; }
# newest VERSION CHOICE ...: the first of the choices that a driver of CUDA VERSION runs; nothing where there is none.
newest() {
  local choice
  for choice in "${@:2}"; do
    if newer "$1" "$choice"; then
      echo "$choice"
      return
    fi
  done
}

# --- what is asked for ---------------------------------------------------------------------------------------------

read_arguments() {
  system=auto toolkit=auto env=$here/.venv lock=$here/requirements.lock dry=0
  [[ ${SKIP_SYSTEM_PACKAGES:-0} == 0 ]] || system=none
  [[ ${SKIP_CUDA_TOOLKIT:-0} == 0 ]] || toolkit=none
  while (($#)); do
    case $1 in
      --help | -h) usage && exit 0 ;;
      --dry-run) dry=1 && shift && continue ;;
      --system | --cuda-toolkit | --python-env | --lock)
        (($# > 1)) || fail "$1 needs a value; see --help" ;;
      *) fail "'$1' is not an option; see --help" ;;
    esac
    case $1 in
      --system) system=$2 ;;
      --cuda-toolkit) toolkit=$2 ;;
      --python-env) env=$2 ;;
      --lock) lock=$2 ;;
    esac
    shift 2
  done
  [[ $system == auto || $system == none ]] || fail "--system '$system': should be auto or none"
  [[ $toolkit =~ ^(auto|none|[0-9]+\.[0-9]+)$ ]] ||
    fail "--cuda-toolkit '$toolkit': should be auto, none or a version as 12.8"
  [[ -f $lock ]] || fail "--lock '$lock': no such file"
  lock=$(realpath "$lock")
  torch_version=$(sed -n 's/^torch==//p' "$lock")
  [[ -n $torch_version ]] || fail "--lock '$lock': pins no torch (a line torch==VERSION)"
  env=$(realpath -m "$env")
  [[ $env$lock != *[[:space:]]* ]] || fail "'$env' and '$lock': paths must not contain spaces"
  # Making an environment clears its folder.
  if [[ -e $env && ! -e $env/installed && $env != "$here"/* && -n $(ls -A "$env" 2>/dev/null) ]]; then
    fail "--python-env '$env' is there and was not made by this script: name a new folder, or remove it"
  fi
}

# --- what is here --------------------------------------------------------------------------------------------------

# Sets gpu (names, empty without a GPU), sm (newest compute capability) and cuda (what the driver runs, empty: unknown).
read_gpu() {
  local driver vendor
  gpu="" sm="" cuda=""
  gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | sort -u | paste -sd , -) || gpu=""
  if [[ -n $gpu ]]; then
    sm=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -V | tail -n 1) || sm=""
    cuda=$(nvidia-smi 2>/dev/null | sed -nE 's/.*CUDA[A-Z ]* Version: *([0-9]+\.[0-9]+).*/\1/p' | head -n 1) || cuda=""
    if [[ -z $cuda ]]; then
      driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || driver=0
      [[ $driver =~ ^[0-9] ]] || driver=0
      ! newer "$driver" 560 || cuda=12.6
      ! newer "$driver" 570 || cuda=12.8
      ! newer "$driver" 580 || cuda=13.0
    fi
    return
  fi
  for vendor in "$root"/sys/bus/pci/devices/*/vendor; do
    if [[ -r $vendor && $(<"$vendor") == 0x10de && $(<"${vendor%vendor}class") == 0x03* ]]; then
      gpu="an NVIDIA GPU whose driver does not answer"
    fi
  done
}

# The build of torch in the environment: cpu, cu130, …; nothing where there is none.
read_torch() {
  [[ ! -e $env/installed ]] || "$env/bin/python" -c '
import torch
print("cu" + torch.version.cuda.replace(".", "") if torch.version.cuda else "cpu")' 2>/dev/null || true
}

# --- what follows --------------------------------------------------------------------------------------------------

# Sets build (empty: any) and index (empty: where the rest comes from).
choose_torch() {
  local version url=${TORCH_INDEX_URL:-}
  build="" index=""
  if [[ -n $url ]]; then
    index=${url%/}
    [[ ! ${index##*/} =~ ^(cpu|cu[0-9]+)$ ]] || build=${index##*/}
    say torch "$torch_version from $index (TORCH_INDEX_URL)"
    return
  fi
  if [[ -z $gpu ]]; then
    say torch "$torch_version, the build that pip finds; smaller: TORCH_INDEX_URL=$TORCH_INDEXES/cpu"
    return
  fi
  version=$(newest "${cuda:-$UNKNOWN_CUDA}" "${TORCH_BUILDS[@]}")
  [[ -n $version ]] ||
    fail "the driver runs CUDA $cuda; torch $torch_version is built for ${TORCH_BUILDS[*]}: install driver 580 or newer," \
      "or do without the GPU: TORCH_INDEX_URL=$TORCH_INDEXES/cpu"
  if [[ -n $sm ]] && newer "$sm" 10.0 && ! newer "$version" 12.8; then
    fail "$gpu (sm_${sm/./}) needs torch for CUDA 13.0, the driver runs CUDA ${cuda:-$UNKNOWN_CUDA}: install driver 580" \
      "or newer, or do without the GPU: TORCH_INDEX_URL=$TORCH_INDEXES/cpu"
  fi
  build=cu${version/./}
  [[ $version == "${TORCH_BUILDS[0]}" ]] || index=$TORCH_INDEXES/$build
  say torch "$torch_version, build $build"
  newer "$version" 13.0 ||
    warn "the CUDA kernels need a driver of CUDA 13 (580 or newer); with this one torch's own operations run"
  [[ -z $sm ]] || newer "$sm" 8.0 || warn "$gpu is sm_${sm/./}: the CUDA kernels need sm_80 or newer"
}

choose_toolkit() {
  if [[ $toolkit == auto && -z $gpu ]]; then
    toolkit=none
  elif [[ $toolkit == auto ]]; then
    toolkit=$(newest "${cuda:-$UNKNOWN_CUDA}" "${TOOLKITS[@]}")
    [[ -n $toolkit ]] || toolkit=none
  fi
  if [[ $toolkit != none && -x $root/usr/local/cuda-$toolkit/bin/nvcc ]]; then
    say "CUDA toolkit" "$toolkit, there already"
    toolkit=none
  else
    say "CUDA toolkit" "$toolkit"
  fi
}

# Sets missing: the Debian packages to install.
choose_packages() {
  local package python
  missing=()
  if [[ $system == none ]]; then
    say system "nothing installed"
    return
  fi
  command -v apt-get >/dev/null ||
    fail "apt-get is not here: install ${PACKAGES[*]} and Python 3.11 or 3.12, then set SKIP_SYSTEM_PACKAGES=1"
  for package in "${PACKAGES[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q '^install ok installed' || missing+=("$package")
  done
  for python in python3.12 python3.11 python3; do
    if $python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
      # torch.compile builds a launcher in C.
      $python -c 'import ensurepip, sysconfig, venv, os
os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || missing+=("$python-venv" "$python-dev")
      python=""
      break
    fi
  done
  if [[ -n $python ]]; then
    # A fresh image has no list of packages yet.
    apt-cache show python3 >/dev/null 2>&1 || as_root apt-get update
    for python in python3.12 python3.11; do
      if apt-cache show "$python" >/dev/null 2>&1; then
        missing+=("$python" "$python-venv" "$python-dev")
        python=""
        break
      fi
    done
  fi
  [[ -z $python ]] || warn "Python 3.11 or 3.12 is not here and this system does not package it"
  say system "${missing[*]:-all there}"
}

# --- doing it ------------------------------------------------------------------------------------------------------

install_packages() {
  ((${#missing[@]})) || return 0
  as_root apt-get update
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "${missing[@]}"
}

install_toolkit() {
  local distribution keyring
  [[ $toolkit != none ]] || return 0
  # shellcheck source=/dev/null
  distribution=$(. "$root/etc/os-release" && [[ $ID == ubuntu || $ID == debian ]] && echo "$ID${VERSION_ID//./}") ||
    fail "NVIDIA's packages are for Debian and Ubuntu: install CUDA $toolkit yourself, then set SKIP_CUDA_TOOLKIT=1"
  keyring=$(mktemp --suffix .deb)
  run curl --fail --silent --show-error --location --output "$keyring" \
    "$TOOLKIT_REPOSITORY/$distribution/x86_64/cuda-keyring_1.1-1_all.deb"
  as_root dpkg --install "$keyring"
  rm -f "$keyring"
  as_root apt-get update
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "cuda-toolkit-${toolkit/./-}"
}

make_environment() {
  local found
  found=$(read_torch)
  for _ in 1 2; do
    if [[ -n $found && -n $build && $found != "$build" ]]; then
      say environment "has torch's $found build: made anew with $build"
      index=${index:-$TORCH_INDEXES/$build}
      run rm -f "$env/installed"
    fi
    run make --no-print-directory -C "$here" "VENV=$env" "LOCK=$lock" "TORCH_INDEX_URL=$index" env
    ((!dry)) || return 0
    found=$(read_torch)
    [[ -n $found ]] || fail "torch does not import in $env"
    [[ -n $build && $found != "$build" ]] || return 0
  done
  fail "$env has torch's $found build, wanted is $build: $index does not have it"
}

main() {
  read_gpu
  say host "${gpu:-no NVIDIA GPU}${gpu:+, CUDA ${cuda:-unknown: taken as $UNKNOWN_CUDA}}"
  choose_packages
  choose_toolkit
  choose_torch
  say environment "$env from $lock"
  install_packages
  install_toolkit
  make_environment
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
root=${BOOTSTRAP_ROOT:-} # another / to look at, for tests
read_arguments "$@"
cd "$here"
if ((dry)); then
  main
else
  log=logs/bootstrap_$(date +%Y%m%d-%H%M%S).log
  mkdir -p logs
  main 2>&1 | tee "$log"
  echo "log: $log"
fi
echo "source $env/bin/activate"
