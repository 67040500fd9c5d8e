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
#   --try        a verl that no patch was made for gets the one for the nearest release, if every line of it fits
#   --installed  the verl that PYTHON would import, in its site-packages; only files below verl/ are put there
#   --no-verify  leave out the tests after applying
#   --python     the Python that runs the tests, by default $PYTHON or python3
# Exit codes: 0 done, or nothing to do; 1 refused or failed; 2 wrong command line.
set -euo pipefail
export LC_ALL=C GIT_TERMINAL_PROMPT=0
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_COMMON_DIR GIT_OBJECT_DIRECTORY GIT_NAMESPACE GIT_PREFIX CDPATH

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
patch_name=0001-on-policy-distillation.patch
journal_name=.opd-patch-journal
backup_name=.opd-patch-backup
merged_name=opd-patch-merged # in git's folder: what --3way made of the patch, which is what --reverse has to take out
mode=apply
installed=0
try=0
verify=1
python=${PYTHON:-python3}
target=
work=
tree=
journal=
started=0
drafting=0

say() { printf '%s\n' "$*"; }
refuse() {
  printf 'refused: %s\n' "$*" >&2
  exit 1
}
usage() {
  sed -n '2,16s/^# \{0,1\}//p' "$here/apply_patch.sh"
}

# `dirname` of a path without a slash at its end, into $parent; a process for each would take most of the time.
parent_of() {
  case $1 in */*) parent=${1%/*} ;; *) parent=. ;; esac
}

# ---- the journal: copies of every file that is about to change, so that anything can be undone ------------------------

write_journal() {
  local kind path draft=$tree/$journal_name.tmp
  drafting=1
  rm -rf "$draft"
  mkdir "$draft" 2>/dev/null || refuse "$tree is read-only; nothing was changed. Make it writable, or copy it and patch the copy."
  : >"$draft/changed" && : >"$draft/new" && : >"$draft/folders"
  printf '%s\n' "$mode" >"$draft/mode"
  printf '%s\n' "$$" >"$draft/process"
  while read -r kind path; do
    if [ -e "$tree/$path" ] || [ -L "$tree/$path" ]; then
      parent_of "$path"
      mkdir -p "$draft/copy/$parent"
      cp -pP "$tree/$path" "$draft/copy/$path"
      printf '%s\n' "$path" >>"$draft/changed"
    else
      printf '%s\n' "$path" >>"$draft/new"
      parent_of "$path"
      while [ "$parent" != . ] && [ ! -d "$tree/$parent" ]; do
        printf '%s\n' "$parent" >>"$draft/folders"
        parent_of "$parent"
      done
    fi
  done <"$work/paths"
  if is_checkout; then
    git -C "$tree" rev-parse -q --verify HEAD >"$draft/head" || rm -f "$draft/head"
    cp -p "$(git_path index)" "$draft/index" 2>/dev/null || true
  fi
  mv "$draft" "$tree/$journal_name"
  journal=$tree/$journal_name
  started=1 drafting=0
}

restore() {
  local from=$1 path
  if [ -f "$from/head" ] && is_checkout; then
    case $(cat "$from/mode") in # check_git saw that neither was there before
      3way | am) rm -rf "$(git_path rebase-apply)" "$(git_path index.lock)" ;;
    esac
    if [ "$(git -C "$tree" rev-parse HEAD)" != "$(cat "$from/head")" ]; then
      git -C "$tree" reset -q "$(cat "$from/head")" || refuse "git cannot go back to commit $(cat "$from/head"); see above, then run this again."
    fi
  fi
  while IFS= read -r path; do
    cmp -s "$from/copy/$path" "$tree/$path" || {
      parent_of "$path"
      mkdir -p "$tree/$parent"
      rm -f "$tree/$path"
      cp -pP "$from/copy/$path" "$tree/$path"
    }
  done <"$from/changed"
  while IFS= read -r path; do rm -f "$tree/$path" "$tree/$path.orig" "$tree/$path.rej"; done <"$from/new"
  while IFS= read -r path; do rm -f "$tree/$path.rej" "$tree/$path.orig"; done <"$from/changed"
  sort -r "$from/folders" | uniq | while IFS= read -r path; do
    find "$tree/$path" -depth -type d -name __pycache__ -exec rm -rf {} + 2>/dev/null || true
    rmdir "$tree/$path" 2>/dev/null || true
  done
  if [ -f "$from/index" ] && is_checkout; then
    cp -p "$from/index" "$(git_path index)"
    [ "$(cat "$from/mode")" != 3way ] || rm -f "$(git_path "$merged_name")"
  fi
  drop_journal "$from"
}

# A journal that is half removed must not look like one.
drop_journal() {
  rm -rf "$tree/$journal_name.tmp"
  mv "$1" "$tree/$journal_name.tmp"
  rm -rf "$tree/$journal_name.tmp"
}

# shellcheck disable=SC2329  # the trap invokes it
finish() {
  local code=$?
  trap - EXIT INT TERM HUP
  if [ "$started" = 1 ] && [ -d "$journal" ]; then
    restore "$journal"
    say "The tree is as it was before." >&2
  fi
  [ -z "$work" ] || rm -rf "$work"
  [ "$drafting" = 0 ] || rm -rf "$tree/$journal_name.tmp"
  exit "$code"
}

# ---- git or patch ------------------------------------------------------------------------------------------------------

have_git() { [ -z "${OPD_PATCH_WITHOUT_GIT:-}" ] && command -v git >/dev/null 2>&1; }

is_checkout() { [ -e "$tree/.git" ] && have_git && git -C "$tree" rev-parse -q --git-dir >/dev/null 2>&1; }

git_path() {
  local path
  path=$(git -C "$tree" rev-parse --git-path "$1")
  case $path in /*) printf '%s\n' "$path" ;; *) printf '%s\n' "$tree/$path" ;; esac
}

# A tree inside another repository, or in none, is a plain folder to git apply.
git_apply() {
  (cd "$tree" && GIT_CEILING_DIRECTORIES=$(dirname "$tree") \
    git -c apply.whitespace=nowarn -c apply.ignorewhitespace=no -c core.autocrlf=false apply --whitespace=nowarn "$@")
}

# run_patch PATCH forward|reverse check|write
run_patch() {
  local options=()
  if have_git; then
    [ "$2" = forward ] || options+=(--reverse)
    [ "$3" = write ] || options+=(--check)
    git_apply ${options[@]+"${options[@]}"} "$1"
  else
    options=(-p1 --fuzz=0 --force --no-backup-if-mismatch --reject-file=- --remove-empty-files)
    if [ "$2" = forward ]; then options+=(--forward); else options+=(--reverse); fi
    [ "$3" = write ] || options+=(--dry-run)
    patch "${options[@]}" --directory="$tree" --input="$1"
  fi
}

fits() { run_patch "$1" "$2" check >"$work/fits.log" 2>&1; }

# The patch in parts, one for each file that it is about.
split_patch() {
  mkdir "$work/sections"
  into=$work/sections/ awk '
    /^diff --git / { name = substr($0, index($0, " b/") + 3); gsub("/", "%", name); file = ENVIRON["into"] name }
    /^-- $/ { file = "" }
    file != "" { print >file }' "$folder/$patch_name"
}

section_of() { printf '%s\n' "$work/sections/${1//\//%}"; }

# ---- looking -----------------------------------------------------------------------------------------------------------

find_tree() {
  local where up
  if [ "$installed" = 1 ]; then
    [ -z "$target" ] || refuse "--installed finds the folder itself; leave out '$target', or leave out --installed."
    where=$(cd "$work" && "$python" -c 'import importlib.util as u; s = u.find_spec("verl"); print(list(s.submodule_search_locations)[0])' 2>/dev/null) ||
      refuse "$python has no verl; give another with --python."
    tree=$(cd "$where/.." && pwd -P)
    return
  fi
  where=${target:-.}
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

# Whether git, where it is needed, can do what is asked of it.
check_git() {
  if have_git && [ -e "$tree/.git" ] && ! is_checkout; then
    git -C "$tree" rev-parse --git-dir >/dev/null 2>"$work/git.log" || true
    refuse "git does not take $tree for a checkout, so whether it is clean cannot be said: $(head -1 "$work/git.log")
Mend that (of another user's folder: git config --global --add safe.directory '$tree'), or set OPD_PATCH_WITHOUT_GIT=1 to use patch alone."
  fi
  case $mode in 3way | am) ;; *) return 0 ;; esac
  have_git || refuse "--$mode needs git, which is not on this machine; leave --$mode out."
  is_checkout || refuse "--$mode needs a git checkout, and $tree is not the top of one; leave --$mode out."
  [ "$installed" = 0 ] || refuse "--$mode is for git checkouts, not for --installed."
}

# git's own unfinished business.
check_idle() {
  local part
  case $mode in 3way | am) ;; *) return 0 ;; esac
  for part in rebase-apply rebase-merge MERGE_HEAD CHERRY_PICK_HEAD REVERT_HEAD index.lock; do
    [ ! -e "$(git_path "$part")" ] ||
      refuse "git is in the middle of something in $tree ($(git_path "$part") is there); end that first (git status says how)."
  done
}

supported() {
  local folder
  for folder in "$here"/*/"$patch_name"; do
    [ ! -f "$folder" ] || basename "$(dirname "$folder")"
  done
}

# Of a version without a number the last one, which is the newest.
nearest_to() {
  supported | awk -v wanted="$1" '
    function number(text, parts) { split(text, parts, /[^0-9]+/); return parts[1] * 10000 + parts[2] * 100 + parts[3] }
    { gap = wanted ~ /[0-9]/ ? number($0) - number(wanted) : 0; if (gap < 0) gap = -gap; if (best == "" || gap <= least) { best = $0; least = gap } }
    END { print best }'
}

find_patch() {
  version=$(tr -d '[:space:]' <"$tree/verl/version/version")
  local name nearest
  for name in "$version" "${version%%.dev*}"; do
    if [ -n "$name" ] && [ -f "$here/$name/$patch_name" ]; then
      folder=$here/$name
      return
    fi
  done
  [ -n "$(supported)" ] || refuse "$here holds no patch; unpack the whole archive, or run: opd verl patch build --verl $version"
  nearest=$(nearest_to "$version")
  folder=$here/$nearest
  if [ "$try" = 1 ]; then
    say "Trying the patch for verl $nearest on verl ${version:-without a version}."
    return
  fi
  # What an earlier --try put in can be looked at and taken out without it.
  case $mode in verify | reverse) [ ! -f "$tree/verl/trainer/ppo/on_policy_distillation.py" ] || return 0 ;; esac
  refuse "$tree is verl ${version:-without a version}, and there are patches for $(supported | tr '\n' ' ')only; the nearest is $nearest. --try puts that one in if every line of it fits; --try --check only looks."
}

select_files() {
  local kind path sections=()
  split_patch
  while read -r kind _ path; do
    if [ "$installed" = 0 ] || [ "${path#verl/}" != "$path" ]; then
      printf '%s %s\n' "$kind" "$path"
      sections+=("$work/sections/${path//\//%}")
    fi
  done < <(grep -v '^#' "$folder/FILES.txt") >"$work/paths"
  cat "${sections[@]}" >"$work/selected.patch"
}

is_running() {
  [ "$1" != "$$" ] && kill -0 "$1" 2>/dev/null || return 1
  ! command -v ps >/dev/null || ps -p "$1" -o args= 2>/dev/null | grep -q apply_patch
}

repair() {
  local earlier=$tree/$journal_name changes=1
  case $mode in check | verify) changes=0 ;; esac
  [ "$changes" = 0 ] || rm -rf "$earlier.tmp"
  [ -d "$earlier" ] || return 0
  ! is_running "$(cat "$earlier/process")" ||
    refuse "another apply_patch.sh is at work in $tree (process $(cat "$earlier/process"))."
  [ "$changes" = 1 ] ||
    refuse "an earlier run was interrupted half way; the next run that applies or reverses restores the tree first."
  say "An earlier run was interrupted half way; restoring the tree to what it was before that."
  restore "$earlier"
}

# Whether the patch is in; then $work/inside.patch is what to take out.
is_in() {
  cp "$work/selected.patch" "$work/inside.patch"
  fits "$work/inside.patch" reverse && return 0
  is_checkout && [ -f "$(git_path "$merged_name")" ] || return 1
  cp "$(git_path "$merged_name")" "$work/inside.patch"
  fits "$work/inside.patch" reverse
}

# What git knows to be changed in this tree, unless that is the patch itself.
dirty() {
  have_git && git -C "$tree" status --porcelain --untracked-files=no -- . 2>/dev/null | head -5
}

check_clean() {
  local found
  found=$(dirty || true)
  [ -z "$found" ] || refuse "$tree has changes that are not committed; commit or stash them first:
$found"
}

check_writable() {
  local kind path part
  while read -r kind path; do
    part=$tree/$path
    [ ! -e "$part" ] || [ -w "$part" ] || refuse "$part is read-only; nothing was changed."
    while part=${part%/*} && [ ! -d "$part" ]; do :; done
    [ -w "$part" ] || refuse "$part is read-only; nothing was changed."
  done <"$work/paths"
}

# Which files are in the way, and which have the change already.
explain_misfit() {
  local kind path has=0 lacks=0 stuck=0
  while read -r kind path; do
    if [ "$kind" = new ] && [ ! -e "$tree/$path" ] && [ ! -L "$tree/$path" ]; then
      lacks=$((lacks + 1))
      printf '  lacks the change    %s\n' "$path" >>"$work/lacking"
      continue
    fi
    cp "$(section_of "$path")" "$work/one.patch"
    if fits "$work/one.patch" reverse; then
      has=$((has + 1))
      [ "$kind" = new ] || printf '  has the change      %s\n' "$path" >>"$work/misfit"
    elif fits "$work/one.patch" forward; then
      lacks=$((lacks + 1))
      printf '  lacks the change    %s\n' "$path" >>"$work/lacking"
    else
      stuck=$((stuck + 1))
      printf '  does not fit        %s\n' "$path" >>"$work/misfit"
      grep -E 'patch failed|already exists|No such file|does not exist|FAILED|previously applied|symbolic link|wrong type' "$work/fits.log" |
        sed 's/^/      /' >>"$work/misfit" || true
      show_hunk "$path" >>"$work/misfit"
    fi
  done <"$work/paths"
  if [ "$has" -gt 0 ]; then
    if [ "$lacks" -gt 0 ]; then cat "$work/lacking" >>"$work/misfit"; fi
    printf 'refused: the patch is partly applied to %s: %d files have it, %d lack it, %d do not fit. Nothing was changed.\n' "$tree" "$has" "$lacks" "$stuck" >&2
  else
    printf 'refused: the patch does not fit %s: %d files are in the way. Nothing was changed.\n' "$tree" "$stuck" >&2
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

# The hunk that git or patch stumbled over.
show_hunk() {
  local line
  line=$(sed -n -e 's/.*patch failed: .*:\([0-9][0-9]*\)$/\1/p' -e 's/^Hunk #[0-9]* FAILED at \([0-9]*\).*/\1/p' "$work/fits.log" | tail -1)
  [ -n "$line" ] || return 0
  awk -v start="@@ -$line," 'index($0, "@@ -") == 1 { inside = (index($0, start) == 1) } inside { print "      | " $0 }' "$work/one.patch" | head -20
}

# ---- doing -------------------------------------------------------------------------------------------------------------

apply_as_asked() {
  case $mode in
    am)
      git -C "$tree" -c core.autocrlf=false am --quiet --keep-cr "$folder/$patch_name" >"$work/apply.log" 2>&1
      ;;
    3way)
      git_apply --3way "$work/selected.patch" >"$work/apply.log" 2>&1 &&
        git -C "$tree" diff --cached --full-index --no-color --no-ext-diff --no-textconv --src-prefix=a/ --dst-prefix=b/ HEAD \
          >"$(git_path "$merged_name")" &&
        cp -p "$journal/index" "$(git_path index)" # like a plain application: nothing is staged
      ;;
    *) run_patch "$work/selected.patch" forward write >"$work/apply.log" 2>&1 ;;
  esac
}

verify_tree() {
  local lacking test=tests/test_on_policy_distillation.py
  if ! grep -q 'import verl.trainer.ppo.on_policy_distillation' "$tree/verl/trainer/ppo/core_algos.py" ||
    ! grep -q '^@register_policy_loss(LOSS_MODE)' "$tree/verl/trainer/ppo/on_policy_distillation.py"; then
    say "failed: the registration of the policy loss is not in the tree." >&2
    return 1
  fi
  say "verified: the policy loss is registered in verl/trainer/ppo/on_policy_distillation.py"
  [ "$verify" = 1 ] || return 0
  if [ "$installed" = 1 ]; then
    awk '/^\+/ && !/^\+\+\+ / { print substr($0, 2) }' "$(section_of "$test")" >"$work/test.py"
    test=$work/test.py
  else
    test=$tree/$test
  fi
  if (cd "$work" && PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$tree${PYTHONPATH:+:$PYTHONPATH} "$python" "$test") >"$work/verify.log" 2>&1; then
    say "verified: $(grep -c '^ok ' "$work/verify.log") added tests pass"
    return 0
  fi
  lacking=$(sed -n "s/^ModuleNotFoundError: No module named '\([^'.]*\).*/\1/p" "$work/verify.log" | tail -1)
  if [ -n "$lacking" ] && [ ! -d "$tree/$lacking" ]; then
    say "not verified: $python lacks $lacking, which verl needs, so the added tests were not run; name the Python of your verl with --python."
  else
    say "failed: the added tests do not pass in the patched tree:" >&2
    tail -30 "$work/verify.log" >&2
    return 1
  fi
}

do_apply() {
  if is_in; then
    say "Already applied to verl $version in $tree; nothing to do."
    exit 0
  fi
  if ! fits "$work/selected.patch" forward; then
    if [ "$mode" != 3way ] || grep -q 'already exists' "$work/fits.log"; then explain_misfit; fi
  fi
  check_clean
  check_idle
  if [ "$mode" = check ]; then
    say "verl $version in $tree: the patch applies ($(wc -l <"$work/paths" | tr -d ' ') files); nothing was changed."
    exit 0
  fi
  check_writable
  write_journal
  if ! apply_as_asked; then
    say "failed: the patch could not be applied:" >&2
    tail -20 "$work/apply.log" >&2
    exit 1
  fi
  verify_tree || exit 1
  done_with_journal
  say "Applied to verl $version in $tree ($mode):"
  list_files
  say_next
}

say_next() {
  say "
Next: python -m verl.trainer.main_ppo … \\
    actor_rollout_ref.actor.policy_loss.loss_mode=on_policy_distillation \\
    actor_rollout_ref.actor.policy_loss.teacher_path=TEACHER"
  if [ "$installed" = 1 ]; then
    say "PATCH_README.md explains the keys. Take it out again, before another verl is installed: apply_patch.sh --installed --reverse --python $(printf %q "$python")"
  else
    say "ON_POLICY_DISTILLATION.md explains every key, and examples/on_policy_distillation has whole command lines.
Take it out again: apply_patch.sh --reverse $(printf %q "$tree")"
  fi
}

do_verify() {
  if fits "$work/selected.patch" forward; then
    refuse "the patch is not in verl $version in $tree; apply it first."
  fi
  is_in || explain_misfit
  verify_tree || exit 1
}

do_reverse() {
  if ! is_in; then
    if fits "$work/selected.patch" forward; then
      say "Not applied to verl $version in $tree; nothing to reverse."
      exit 0
    fi
    explain_misfit
  fi
  check_writable
  write_journal
  if ! run_patch "$work/inside.patch" reverse write >"$work/apply.log" 2>&1; then
    say "failed: the patch could not be taken out:" >&2
    tail -20 "$work/apply.log" >&2
    exit 1
  fi
  remove_empty_folders
  drop_journal "$journal"
  started=0
  rm -rf "${tree:?}/$backup_name"
  if is_checkout; then rm -f "$(git_path "$merged_name")"; fi
  say "Taken out of verl $version in $tree."
  if is_checkout && git -C "$tree" log -1 --format=%s 2>/dev/null | grep -q 'on-policy distillation as a policy loss'; then
    say "The commit that brought it is still in the history: commit this, or git revert it instead."
  fi
}

# Folders that only the patch had filled, and the byte code that Python left in them.
remove_empty_folders() {
  local kind path name
  while read -r kind path; do
    [ "$kind" = new ] || continue
    name=${path##*/}
    parent_of "$path"
    while [ "$parent" != . ] && [ -d "$tree/$parent" ]; do
      if [ -z "$(find "$tree/$parent" ! -type d ! -path '*/__pycache__/*' | head -1)" ]; then
        rm -rf "${tree:?}/$parent"
      else
        if [ -d "$tree/$parent/__pycache__" ]; then
          rm -f "$tree/$parent/__pycache__/${name%.py}".*.pyc
          rmdir "$tree/$parent/__pycache__" 2>/dev/null || true
        fi
        break
      fi
      parent_of "$parent"
    done
  done <"$work/paths"
}

done_with_journal() {
  if [ "$installed" = 1 ]; then
    rm -rf "${tree:?}/$backup_name"
    mv "$journal" "$tree/$backup_name"
    started=0
    say "The files as they were are in $tree/$backup_name"
  else
    drop_journal "$journal"
    started=0
  fi
}

list_files() {
  local kind path
  while read -r kind path; do printf '  %-8s %s\n' "$kind" "$path"; done <"$work/paths"
}

# One group, so that bash has read all of this file before any of it runs: the file may change meanwhile.
{
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) usage && exit 0 ;;
      --check | --verify | --reverse | --3way | --am)
        [ "$mode" = apply ] || {
          say "--$mode and $1 exclude each other" >&2
          exit 2
        }
        mode=${1#--}
        ;;
      --installed) installed=1 ;;
      --try) try=1 ;;
      --no-verify) verify=0 ;;
      --python)
        [ $# -gt 1 ] || {
          say "--python needs a program" >&2
          exit 2
        }
        python=$2
        shift
        ;;
      --) ;;
      -*)
        say "apply_patch.sh has no option $1" >&2
        usage >&2
        exit 2
        ;;
      *)
        [ -z "$target" ] || {
          say "one folder, not two: $target and $1" >&2
          exit 2
        }
        target=$1
        ;;
    esac
    shift
  done

  have_git || patch --version 2>/dev/null | grep -q GNU || refuse "neither git nor GNU patch is on this machine; install one of them."
  work=$(mktemp -d)
  trap finish EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM HUP
  trap 'exit 141' PIPE
  find_python
  find_tree
  find_patch
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
