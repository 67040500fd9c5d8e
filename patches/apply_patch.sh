#!/usr/bin/env bash
# Puts on-policy distillation into a verl tree, or takes it out again. On any failure the tree is as it was before.
#
#   apply_patch.sh [--check | --verify | --reverse | --3way | --am] [--try] [--installed] [--no-verify] [--python PYTHON] [VERL_DIR]
#
# VERL_DIR is a git checkout of verl, an unpacked release, or a folder inside one; without it, the folder you are in.
#   --check      say what would happen; change nothing
#   --verify     is it in, and do the added tests pass? Changes nothing
#   --reverse    take the patch out
#   --3way       let git merge where the lines around a change differ (git checkouts)
#   --am         make a commit (git checkouts)
#   --try        a verl that the patch was not made for gets it if every line of it fits
#   --installed  the verl that PYTHON would import, in its site-packages; only files below verl/ are put there
#   --no-verify  leave out the tests after applying
#   --python     the Python that runs the tests, by default $PYTHON or python3
# Exit codes: 0 done, or nothing to do; 1 refused or failed; 2 wrong command line.
set -euo pipefail
export LC_ALL=C GIT_TERMINAL_PROMPT=0
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_COMMON_DIR GIT_OBJECT_DIRECTORY GIT_NAMESPACE GIT_PREFIX CDPATH

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
patch=$here/0001-on-policy-distillation.patch
files=$here/FILES.txt
added_test=tests/test_on_policy_distillation.py
mode=apply installed=0 try=0 verify=1 python=${PYTHON:-python3}
target='' work='' tree='' journal='' # the journal: copies of what is about to change, from which any failure is undone

say() { printf '%s\n' "$*"; }
fail() { printf 'failed: %s\n' "$*" >&2 && return 1; }
refuse() {
  printf 'refused: %s\n' "$*" >&2
  exit 1
}
misuse() {
  say "$1" >&2
  exit 2
}

# ---- git, or GNU patch where there is no git ---------------------------------------------------------------------------

have_git() { [ -z "${OPD_PATCH_WITHOUT_GIT:-}" ] && command -v git >/dev/null 2>&1; }
in_tree() { git -C "$tree" "$@"; }
is_checkout() { [ -e "$tree/.git" ] && have_git && in_tree rev-parse -q --git-dir >/dev/null 2>&1; }
git_path() { in_tree rev-parse --path-format=absolute --git-path "$1"; }

# A tree inside another repository, or in none, is a plain folder to git apply.
git_apply() {
  (cd "$tree" && GIT_CEILING_DIRECTORIES=$(dirname "$tree") \
    git -c apply.ignorewhitespace=no -c core.autocrlf=false apply --whitespace=nowarn "$@")
}

# run_patch forward|reverse check|write PATCH. A merge leaves one line on each side of a change as it was, so -C1 takes it out again.
run_patch() {
  local way=() check=()
  if have_git; then
    [ "$1" = forward ] || way=(--reverse -C1)
    [ "$2" = write ] || check=(--check)
    git_apply ${way[@]+"${way[@]}"} ${check[@]+"${check[@]}"} "$3"
  else
    [ "$2" = write ] || check=(--dry-run)
    command patch -p1 --fuzz=0 --force "--$1" --no-backup-if-mismatch --reject-file=- --remove-empty-files ${check[@]+"${check[@]}"} \
      --directory="$tree" --input="$3"
  fi
}

fits() { run_patch "$1" check "$2" >"$work/fits.log" 2>&1; }

# The parts of the patch about files whose path begins so, with the blobs of release number $base for --3way to start from.
sections() {
  awk -v wanted="$1" -v base="$base" '
    NR == FNR { if ($1 == "changed") blob[$3] = $(3 + base); next }
    /^diff --git / { path = substr($0, index($0, " b/") + 3); inside = wanted == "" || index(path, wanted) == 1 }
    /^-- $/ { inside = 0 }
    /^index / && path in blob { sub(/^index [0-9a-f]+/, "index " blob[path]) }
    inside' "$files" "$patch"
}

# ---- looking -----------------------------------------------------------------------------------------------------------

find_tree() {
  local where=${target:-.} up
  if [ "$installed" = 1 ]; then
    [ -z "$target" ] || refuse "--installed finds the folder itself; leave out '$target', or leave out --installed."
    where=$(cd "$work" && "$python" -c 'import importlib.util as u; s = u.find_spec("verl"); print(list(s.submodule_search_locations)[0])' 2>/dev/null) ||
      refuse "$python has no verl; give another with --python."
  fi
  [ -d "$where" ] || refuse "$where is not a folder; give the folder of a verl checkout or release."
  up=$(cd "$where" && pwd -P)
  while [ ! -f "$up/verl/version/version" ]; do
    [ "$up" != / ] || refuse "$where is not a verl tree: neither it nor a folder above it holds verl/version/version."
    up=$(dirname "$up")
  done
  tree=$up
}

# `--python` may be a path from where we are; the tests run elsewhere.
find_python() {
  case $python in
    */*)
      [ -x "$python" ] && [ ! -d "$python" ] || refuse "--python $python is not a program."
      python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
      ;;
    *) [ "$mode" = check ] || [ "$mode" = reverse ] || [ "$verify" = 0 ] || command -v "$python" >/dev/null ||
      refuse "there is no program $python to run the added tests with; name one with --python, or give --no-verify." ;;
  esac
}

# The release that this verl is, or with --try the nearest: its name, and its number in the first line of FILES.txt.
find_release() {
  [ -f "$patch" ] && [ -f "$files" ] || refuse "$here holds no patch; unpack the whole archive."
  supported=$(sed -n '1s/^# verl //p' "$files")
  version=$(tr -d '[:space:]' <"$tree/verl/version/version")
  local nearest
  # Of a version without a number the last one, which is the newest.
  read -r base nearest < <(say "$supported" | tr ' ' '\n' | awk -v wanted="${version%%.dev*}" '
    function number(text, parts) { split(text, parts, /[^0-9]+/); return parts[1] * 10000 + parts[2] * 100 + parts[3] }
    { gap = wanted ~ /[0-9]/ ? number($0) - number(wanted) : 0; if (gap < 0) gap = -gap; if (best == "" || gap <= least) { best = NR " " $0; least = gap } }
    END { print best }')
  case $nearest in "$version" | "${version%%.dev*}") return 0 ;; esac
  if [ "$try" = 1 ]; then
    say "Trying the patch for verl $nearest on verl ${version:-without a version}."
    return
  fi
  # What an earlier --try put in can be looked at and taken out without it.
  case $mode in verify | reverse) [ ! -f "$tree/verl/trainer/ppo/on_policy_distillation.py" ] || return 0 ;; esac
  refuse "$tree is verl ${version:-without a version}, and the patch is for $supported only; the nearest is $nearest. --try puts that one in if every line of it fits; --try --check only looks."
}

# What is put into the tree: "new PATH" or "changed PATH" for each file, and their parts of the patch.
select_files() {
  local below=''
  [ "$installed" = 0 ] || below=verl/
  awk -v below="$below" '!/^#/ && (below == "" || index($3, below) == 1) { print $1, $3 }' "$files" >"$work/paths"
  sections "$below" >"$work/selected.patch"
}

# Whether git, where it is needed, can do what is asked of it.
check_git() {
  if have_git && [ -e "$tree/.git" ] && ! is_checkout; then
    in_tree rev-parse --git-dir >/dev/null 2>"$work/git.log" || true
    refuse "git does not take $tree for a checkout, so whether it is clean cannot be said: $(head -1 "$work/git.log")
Mend that (of another user's folder: git config --global --add safe.directory '$tree'), or set OPD_PATCH_WITHOUT_GIT=1 to use patch alone."
  fi
  case $mode in 3way | am) ;; *) return 0 ;; esac
  have_git || refuse "--$mode needs git, which is not on this machine; leave --$mode out."
  is_checkout || refuse "--$mode needs a git checkout, and $tree is not the top of one; leave --$mode out."
  [ "$installed" = 0 ] || refuse "--$mode is for git checkouts, not for --installed."
}

# Work of the user's own, in the files or in git, that must not be mixed up with the patch.
check_clean() {
  local found part
  found=$(have_git && in_tree status --porcelain --untracked-files=no -- . 2>/dev/null | head -5 || true)
  [ -z "$found" ] || refuse "$tree has changes that are not committed; commit or stash them first:
$found"
  case $mode in 3way | am) ;; *) return 0 ;; esac
  for part in rebase-apply rebase-merge MERGE_HEAD CHERRY_PICK_HEAD REVERT_HEAD index.lock; do
    [ ! -e "$(git_path "$part")" ] ||
      refuse "git is in the middle of something in $tree ($(git_path "$part") is there); end that first (git status says how)."
  done
}

check_writable() {
  local path part
  while read -r _ path; do
    part=$tree/$path
    [ ! -e "$part" ] || [ -w "$part" ] || refuse "$part is read-only; nothing was changed."
    while part=${part%/*} && [ ! -d "$part" ]; do :; done
    [ -w "$part" ] || refuse "$part is read-only; nothing was changed."
  done <"$work/paths"
}

# Which files are in the way, which lack the change, and which have it already.
explain_misfit() {
  local kind path has=0 lacks=0 stuck=0 one=$work/one.patch
  : >"$work/lacking" && : >"$work/misfit"
  while read -r kind path; do
    sections "$path" >"$one"
    if fits reverse "$one"; then
      has=$((has + 1))
      [ "$kind" = new ] || printf '  has the change      %s\n' "$path" >>"$work/misfit"
    elif fits forward "$one"; then
      lacks=$((lacks + 1))
      printf '  lacks the change    %s\n' "$path" >>"$work/lacking"
    else
      stuck=$((stuck + 1))
      printf '  does not fit        %s\n' "$path" >>"$work/misfit"
      { grep -E 'patch failed|already exists|No such file|does not exist|FAILED|previously applied|symbolic link|wrong type' "$work/fits.log" |
        sed 's/^/      /' && show_hunk; } >>"$work/misfit" || true
    fi
  done <"$work/paths"
  if [ "$has" -gt 0 ]; then
    cat "$work/lacking" >>"$work/misfit"
    say "refused: the patch is partly applied to $tree: $has files have it, $lacks lack it, $stuck do not fit. Nothing was changed." >&2
  else
    say "refused: the patch does not fit $tree: $stuck files are in the way. Nothing was changed." >&2
  fi
  cat "$work/misfit" >&2
  if [ "$stuck" = 0 ] && [ "$has" = "$(grep -c '^new ' "$work/paths")" ]; then
    say "Only the added files are there, as after pip replaced a patched verl. Remove them (PATCH_README.md says which), then run this again." >&2
  fi
  case $mode in
    apply | check) ! is_checkout || [ "$has" -gt 0 ] || say "git may be able to merge it: apply_patch.sh --3way" >&2 ;;
  esac
  exit 1
}

# The hunk of one.patch that git or patch stumbled over.
show_hunk() {
  local line
  line=$(sed -n -e 's/.*patch failed: .*:\([0-9][0-9]*\)$/\1/p' -e 's/^Hunk #[0-9]* FAILED at \([0-9]*\).*/\1/p' "$work/fits.log" | tail -1)
  [ -n "$line" ] || return 0
  awk -v start="@@ -$line," 'index($0, "@@ -") == 1 { inside = (index($0, start) == 1) } inside { print "      | " $0 }' "$work/one.patch" | head -20
}

# ---- undoing -----------------------------------------------------------------------------------------------------------

write_journal() {
  local path draft=$tree/.opd-patch-journal.tmp
  rm -rf "$draft"
  mkdir -p "$draft/copy" 2>/dev/null || refuse "$tree is read-only; nothing was changed. Make it writable, or copy it and patch the copy."
  journal=$draft
  cp "$work/paths" "$draft/paths"
  say "$$" >"$draft/process"
  while read -r _ path; do
    [ -e "$tree/$path" ] || continue
    mkdir -p "$draft/copy/$(dirname "$path")"
    cp -pP "$tree/$path" "$draft/copy/$path"
  done <"$work/paths"
  if [ "$mode" = am ]; then
    in_tree rev-parse -q --verify HEAD >"$draft/head"
    cp -p "$(git_path index)" "$draft/index"
  fi
  mv "$draft" "$tree/.opd-patch-journal"
  journal=$tree/.opd-patch-journal
}

restore() {
  if [ -f "$1/head" ]; then # --am; check_clean saw that git had nothing else under way
    rm -rf "$(git_path rebase-apply)" "$(git_path index.lock)"
    in_tree update-ref HEAD "$(cat "$1/head")" || refuse "git cannot go back to commit $(cat "$1/head"); see above, then run this again."
    cp -p "$1/index" "$(git_path index)"
  fi
  cp -RpP "$1/copy/." "$tree/"
  remove_added "$1/paths" "$1/copy"
  drop_journal "$1"
}

# A journal that is half removed must not look like one.
drop_journal() {
  rm -rf "$tree/.opd-patch-journal.tmp"
  mv "$1" "$tree/.opd-patch-journal.tmp"
  rm -rf "$tree/.opd-patch-journal.tmp"
  journal=''
}

# Remove the new files among these paths unless folder $2 holds them, their byte code, and the folders that held nothing else.
remove_added() {
  local kind path name gone=() folder
  while read -r kind path; do
    [ "$kind" = new ] && [ ! -e "$2/$path" ] || continue
    name=${path##*/}
    gone+=("$tree/$path" "$tree/${path%"$name"}__pycache__/${name%.py}".*.pyc)
  done <"$1"
  [ ${#gone[@]} -gt 0 ] || return 0
  rm -f "${gone[@]}"
  awk '$1 == "new" { while (sub(/\/[^\/]*$/, "", $2)) print $2 }' "$1" | sort -ru | while IFS= read -r folder; do
    rmdir "$tree/$folder/__pycache__" "$tree/$folder" 2>/dev/null || true
  done
}

# What an earlier run left, if it was killed.
repair() {
  local earlier=$tree/.opd-patch-journal pid
  if [ ! -d "$earlier" ]; then
    case $mode in check | verify) ;; *) rm -rf "$earlier.tmp" ;; esac
    return
  fi
  pid=$(cat "$earlier/process")
  if [ "$pid" != "$$" ] && kill -0 "$pid" 2>/dev/null && { ! command -v ps >/dev/null || ps -p "$pid" -o args= 2>/dev/null | grep -q apply_patch; }; then
    refuse "another apply_patch.sh is at work in $tree (process $pid)."
  fi
  case $mode in
    check | verify) refuse "an earlier run was interrupted half way; the next run that applies or reverses restores the tree first." ;;
  esac
  say "An earlier run was interrupted half way; restoring the tree to what it was before that."
  restore "$earlier"
}

# shellcheck disable=SC2329  # the trap invokes it
finish() {
  local code=$?
  trap - EXIT INT TERM HUP
  case $journal in
    *.tmp) rm -rf "$journal" ;;
    ?*)
      restore "$journal"
      say "The tree is as it was before." >&2
      ;;
  esac
  [ -z "$work" ] || rm -rf "$work"
  exit "$code"
}

# ---- doing -------------------------------------------------------------------------------------------------------------

apply_as_asked() {
  case $mode in
    am) in_tree -c core.autocrlf=false am --quiet --keep-cr "$patch" ;;
    3way) # in an index of its own: like a plain application, nothing is staged
      cp -p "$(git_path index)" "$work/index"
      GIT_INDEX_FILE=$work/index git_apply --3way "$work/selected.patch"
      ;;
    *) run_patch forward write "$work/selected.patch" ;;
  esac
}

verify_tree() {
  local lacking test=$tree/$added_test
  if ! grep -q 'import verl.trainer.ppo.on_policy_distillation' "$tree/verl/trainer/ppo/core_algos.py" ||
    ! grep -q '^@register_policy_loss(LOSS_MODE)' "$tree/verl/trainer/ppo/on_policy_distillation.py"; then
    fail "the registration of the policy loss is not in the tree."
  fi
  say "verified: the policy loss is registered in verl/trainer/ppo/on_policy_distillation.py"
  [ "$verify" = 1 ] || return 0
  if [ "$installed" = 1 ]; then
    test=$work/test.py
    sections "$added_test" | sed -n '/^+++/d; s/^+//p' >"$test"
  fi
  if (cd "$work" && PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$tree${PYTHONPATH:+:$PYTHONPATH} "$python" "$test") >"$work/verify.log" 2>&1; then
    say "verified: $(grep -c '^ok ' "$work/verify.log") added tests pass"
    return 0
  fi
  lacking=$(sed -n "s/^ModuleNotFoundError: No module named '\([^'.]*\).*/\1/p" "$work/verify.log" | tail -1)
  if [ -z "$lacking" ] || [ -d "$tree/$lacking" ]; then
    fail "the added tests do not pass in the patched tree:
$(tail -30 "$work/verify.log")"
  fi
  say "not verified: $python lacks $lacking, which verl needs, so the added tests were not run; name the Python of your verl with --python."
}

do_apply() {
  if fits reverse "$work/selected.patch"; then
    say "Already applied to verl $version in $tree; nothing to do."
    return
  fi
  if ! fits forward "$work/selected.patch"; then
    if [ "$mode" != 3way ] || grep -q 'already exists' "$work/fits.log"; then explain_misfit; fi
  fi
  check_clean
  if [ "$mode" = check ]; then
    say "verl $version in $tree: the patch applies ($(wc -l <"$work/paths" | tr -d ' ') files); nothing was changed."
    return
  fi
  check_writable
  write_journal
  apply_as_asked >"$work/apply.log" 2>&1 || fail "the patch could not be applied:
$(tail -20 "$work/apply.log")"
  verify_tree
  if [ "$installed" = 1 ]; then
    say "The files as they were are in $tree/.opd-patch-backup"
    rm -rf "${tree:?}/.opd-patch-backup"
    mv "$journal" "$tree/.opd-patch-backup"
    journal=''
  else
    drop_journal "$journal"
  fi
  say "Applied to verl $version in $tree ($mode):"
  sed 's/^/  /' "$work/paths"
  say "
Next: python -m verl.trainer.main_ppo … \\
    actor_rollout_ref.actor.policy_loss.loss_mode=on_policy_distillation \\
    actor_rollout_ref.actor.policy_loss.opd.teacher.model=TEACHER"
  if [ "$installed" = 1 ]; then
    say "PATCH_README.md explains the keys. Take it out again, before another verl is installed: apply_patch.sh --installed --reverse --python $(printf %q "$python")"
  else
    say "ON_POLICY_DISTILLATION.md explains every key, and examples/on_policy_distillation has whole command lines.
Take it out again: apply_patch.sh --reverse $(printf %q "$tree")"
  fi
}

do_verify() {
  ! fits forward "$work/selected.patch" || refuse "the patch is not in verl $version in $tree; apply it first."
  fits reverse "$work/selected.patch" || explain_misfit
  verify_tree
}

do_reverse() {
  if ! fits reverse "$work/selected.patch"; then
    fits forward "$work/selected.patch" || explain_misfit
    say "Not applied to verl $version in $tree; nothing to reverse."
    return
  fi
  check_writable
  write_journal
  run_patch reverse write "$work/selected.patch" >"$work/apply.log" 2>&1 || fail "the patch could not be taken out:
$(tail -20 "$work/apply.log")"
  remove_added "$work/paths" "$work/nothing"
  rm -rf "${tree:?}/.opd-patch-backup"
  drop_journal "$journal"
  say "Taken out of verl $version in $tree."
  if is_checkout && in_tree log -1 --format=%s 2>/dev/null | grep -q 'on-policy distillation as a policy loss'; then
    say "The commit that brought it is still in the history: commit this, or git revert it instead."
  fi
}

# One group, so that bash has read all of this file before any of it runs: the file may change meanwhile.
{
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) sed -n '2,16s/^# \{0,1\}//p' "$here/apply_patch.sh" && exit 0 ;;
      --check | --verify | --reverse | --3way | --am)
        [ "$mode" = apply ] || misuse "--$mode and $1 exclude each other"
        mode=${1#--}
        ;;
      --installed) installed=1 ;;
      --try) try=1 ;;
      --no-verify) verify=0 ;;
      --python)
        [ $# -gt 1 ] || misuse "--python needs a program"
        python=$2
        shift
        ;;
      --) ;;
      -*) misuse "apply_patch.sh has no option $1; see apply_patch.sh --help" ;;
      *)
        [ -z "$target" ] || misuse "one folder, not two: $target and $1"
        target=$1
        ;;
    esac
    shift
  done

  have_git || command patch --version 2>/dev/null | grep -q GNU || refuse "neither git nor GNU patch is on this machine; install one of them."
  work=$(mktemp -d)
  trap finish EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM HUP
  trap 'exit 141' PIPE
  find_python
  find_tree
  find_release
  check_git
  select_files
  repair
  case $mode in
    reverse) do_reverse ;;
    verify) do_verify ;;
    *) do_apply ;;
  esac
  exit 0
}
