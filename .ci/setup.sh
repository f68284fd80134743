#!/usr/bin/env bash
# Prepare this checkout: system packages, then .venv with the pinned requirements and the project itself, installed so
# that changes of its code count at once (editable). `make setup` calls it.
#
#   - Nothing to do is the common case and takes a fraction of a second: the stamp in .venv says what it was made from.
#   - .venv is made again when it is broken, half made, moved, or made by another Python or on another system (FFCV is
#     compiled against the system's OpenCV). When only the requirements have changed, it is brought up to date.
#   - A SLURM for the tests is installed where there is none, and no service is started. Without it the rest continues.
#     So is a browser, in which they open the report.
#   - PYTHON=python3.12 chooses the interpreter; without it the newest of 3.13, 3.12 and 3.11 that fits is taken.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
stamp=$venv/setup-stamp # written last, so a .venv without it is half made

# build-essential: FFCV at install, DeepSpeed's CPU operators at run time. libtbb12: numba's threads. git: provenance.
required=(build-essential pkg-config libopencv-dev libturbojpeg0-dev libtbb12 python3-venv python3-dev git ca-certificates)
# The 70,000 images of the demo. Not in every archive: `launch data write` downloads them where they are missing.
optional=(dataset-fashion-mnist)
# tests/support/slurm_cluster.py starts these programs itself, with accounting, as the user who runs the tests.
for_tests=(slurmctld slurmd slurm-client slurmdbd munge mariadb-server-core mariadb-client-core)
without_slurm=$venv/without-slurm # written when they could not be installed, so that the next call does not try again
# tests/unit/report/test_page_in_browser.py opens the report's page in one of these; the first is Debian's package. Ubuntu's is
# a snap, which containers cannot run and which sees no temporary files: there, Chrome counts alone.
browsers=(chromium chromium-browser google-chrome)
on_ubuntu() { (. /etc/os-release && [[ $ID == ubuntu ]]) 2>/dev/null; }
if on_ubuntu; then browsers=(google-chrome); fi
without_browser=$venv/without-browser # none was installed; says why if none can be, and then its tests are skipped

say() { printf '[setup] %s\n' "$*"; }
die() {
  printf '[setup] error: %s\n' "$1" >&2
  printf '[setup]        %s\n' "${@:2}" >&2
  exit 1
}

# --- what is there ---------------------------------------------------------------------------------------------------

# Prints the named Debian packages that are not installed.
not_installed() {
  local installed package
  installed=$(dpkg-query -W -f='${db:Status-Status} ${Package}\n' "$@" 2>/dev/null || true)
  for package in "$@"; do
    grep -qx "installed $package" <<<"$installed" || echo "$package"
  done
}

# Prints what the build needs and will not find, on any system.
not_found() {
  command -v g++ >/dev/null || echo "g++"
  command -v git >/dev/null || echo "git"
  command -v pkg-config >/dev/null || echo "pkg-config"
  pkg-config --exists opencv4 2>/dev/null || echo "OpenCV with headers (opencv4.pc)"
  pkg-config --exists libturbojpeg 2>/dev/null || echo "TurboJPEG with headers (libturbojpeg.pc)"
  [[ $(/sbin/ldconfig -p) == *libtbb.so.12* ]] || echo "oneTBB (libtbb.so.12)"
}

# Prints the programs of for_tests that are missing. Daemons may be where only root's PATH leads.
tests_lack() {
  local program
  for program in sbatch slurmctld slurmd slurmdbd munged mariadbd mariadb-install-db my_print_defaults; do
    command -v $program >/dev/null || [[ -x /usr/sbin/$program ]] || echo $program
  done
}

no_browser() {
  local program
  for program in "${browsers[@]}"; do
    if command -v "$program" >/dev/null; then return 1; fi
  done
}

# What a .venv depends on, in two lines: the place that the Python $1 would make it in, and what goes into it.
place() {
  local version
  version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])') &&
    (. /etc/os-release && echo "python $version on $ID ${VERSION_ID:-rolling} in $PWD")
}
contents() { cat requirements.txt constraints.txt pyproject.toml .ci/setup.sh | sha256sum | cut -d' ' -f1; }

same_place() { [[ -f $stamp && $(head -n 1 $stamp) == "$(place "${PYTHON:-$venv/bin/python}" 2>/dev/null)" ]]; }
up_to_date() {
  same_place && [[ $(tail -n 1 $stamp) == "$(contents)" && -z $(not_found) ]] && $venv/bin/python -c '' 2>/dev/null
}
tests_settled() { [[ -e $without_slurm || -z $(tests_lack) ]]; }
browser_settled() { [[ -e $without_browser ]] || ! no_browser; }

# --- system packages -------------------------------------------------------------------------------------------------

as_root() {
  if [[ $(id -u) == 0 ]]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    say "neither root nor sudo: cannot run $*" >&2
    return 1
  fi
}

apt() { # A fresh machine may be installing its own updates: wait for that, but not forever.
  say "apt-get $*"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 "$@" >/dev/null
}

system_packages() {
  local missing=() extra=()
  if command -v apt-get >/dev/null; then
    mapfile -t missing < <(not_installed "${required[@]}")
    mapfile -t extra < <(not_installed "${optional[@]}")
    if ((${#missing[@]} + ${#extra[@]})); then
      apt update || say "the package lists could not be updated; continuing with the present ones"
    fi
    if ((${#missing[@]})); then
      apt install --no-install-recommends "${missing[@]}" || say "apt-get failed; continuing if the rest is here"
    fi
    if ((${#extra[@]})); then
      apt install --no-install-recommends "${extra[@]}" || say "continuing without: its data is downloaded when needed"
    fi
  fi
  mapfile -t missing < <(not_found)
  ((${#missing[@]} == 0)) || die "not found: $(printf '%s, ' "${missing[@]}" | sed 's/, $//')" \
    "Install it, then run make again:" \
    "  Debian, Ubuntu   apt-get install --no-install-recommends ${required[*]}" \
    "  Fedora           dnf install gcc-c++ make pkgconf-pkg-config opencv-devel turbojpeg-devel tbb python3-devel git" \
    "  elsewhere        g++, git, pkg-config, OpenCV 4 and TurboJPEG with headers, oneTBB, Python 3.11 to 3.13 with headers"
}

# Runs "$@" while Debian's packages do not start their services: SLURM's would all fail, and munged is not needed here.
without_services() (
  policy=/usr/sbin/policy-rc.d
  if [[ ! -e $policy ]]; then
    trap 'as_root rm -f $policy' EXIT
    as_root sh -c 'printf "#!/bin/sh\nexit 101\n" >"$1" && chmod 755 "$1"' sh $policy || exit
  fi
  "$@"
)

install_for_tests() {
  command -v apt-get >/dev/null || return 1
  if command -v sbatch >/dev/null && [[ -n $(not_installed slurm-client) ]]; then
    say "this machine's SLURM is not the system's: nothing is installed beside it"
    return 1
  fi
  apt update || say "the package lists could not be updated; continuing with the present ones"
  without_services apt install --no-install-recommends "${for_tests[@]}" || return 1
  [[ -z $(tests_lack) ]]
}

test_packages() {
  install_for_tests && return
  say "missing: $(tests_lack | paste -sd' '). Only tests/slurm needs them, and fails without."
  say "Debian, Ubuntu: apt-get install --no-install-recommends ${for_tests[*]}"
  touch $without_slurm
}

browser_package() {
  if on_ubuntu; then
    echo "Ubuntu has no package of Chromium but a snap; install google-chrome" >$without_browser
    say "$(<$without_browser). Until then tests/unit/report/test_page_in_browser.py is skipped."
    return
  fi
  if command -v apt-get >/dev/null && { apt update || true; } && apt install --no-install-recommends "${browsers[0]}"; then
    no_browser || return 0
  fi
  say "no browser is here (${browsers[*]}). Only tests/unit/report/test_page_in_browser.py needs one, and fails without."
  touch $without_browser
}

# --- Python ----------------------------------------------------------------------------------------------------------

# Prints why the interpreter $1 cannot carry the project; nothing when it can.
misfit() {
  "$1" - 2>/dev/null <<'PYTHON' || echo "does not run"
import importlib.util, os, sys, sysconfig

version = "%d.%d" % sys.version_info[:2]
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    print("is Python " + version)
elif importlib.util.find_spec("ensurepip") is None:
    print("cannot make a virtual environment (Debian, Ubuntu: apt-get install python%s-venv)" % version)
elif not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
    print("has no headers (Debian, Ubuntu: apt-get install python%s-dev)" % version)
PYTHON
}

choose_python() { # sets $python
  local reason reasons=() candidates=(python3.13 python3.12 python3.11 python3)
  if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
  for python in "${candidates[@]}"; do
    if command -v "$python" >/dev/null; then reason=$(misfit "$python"); else reason="not found"; fi
    [[ -n $reason ]] || return 0
    reasons+=("  $python: $reason")
  done
  die "no Python 3.11, 3.12 or 3.13 that fits:" "${reasons[@]}" \
    "Install one (Debian, Ubuntu: apt-get install python3.11 python3.11-venv python3.11-dev)," \
    "or name one that is elsewhere: make setup PYTHON=/path/to/python3.12"
}

# --- .venv -----------------------------------------------------------------------------------------------------------

make_venv() {
  if ! same_place; then
    choose_python
    say "making .venv with $python ($("$python" --version))"
    rm -rf $venv
    "$python" -m venv $venv
  fi
  rm -f $stamp # until everything below has succeeded
  rm -f $without_browser # tried again with every change
  export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
  export DS_BUILD_OPS=0 # DeepSpeed compiles what it needs at run time; never CUDA operators while it is installed
  say "installing requirements.txt (into a fresh .venv: about 3 GB to download, several minutes)"
  $venv/bin/python -m pip install -q "$(grep -o '^pip==[^ ]*' requirements.txt)"
  $venv/bin/python -m pip install --progress-bar off -r requirements.txt -c constraints.txt \
    --build-constraint constraints.txt | sed -u '/^Requirement already satisfied/d'
  # Needs only pyproject.toml, and no download: what builds it is pinned and already installed.
  $venv/bin/python -m pip install -q --no-deps --no-build-isolation --editable .
  $venv/bin/python -m pip check
  say "importing what was built here"
  $venv/bin/python -c 'import torch, torchvision, ffcv, deepspeed, ray' >/dev/null
  { place $venv/bin/python && contents; } >$stamp
}

if up_to_date && tests_settled && browser_settled; then exit 0; fi
# One at a time: a second `make` in this checkout waits for the first, then finds nothing to do.
exec 9>>.ci/setup.sh
flock -w 1800 9 || die "another make setup has been running here for 30 minutes"
if ! up_to_date; then
  system_packages
  make_venv
fi
tests_settled || test_packages
browser_settled || browser_package
say "done: .venv/bin/python ($($venv/bin/python --version))"
