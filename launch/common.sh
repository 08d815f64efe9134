# shellcheck shell=sh
# What the launch scripts share: refusing a variable, and running a command or printing it. Sourced, not run.

# refuse NAME VALUE MUST-BE: the end, with one line that says what would work.
refuse() {
    echo "error: $1=$2: must be $3" >&2
    exit 2
}

# number NAME VALUE LEAST [MOST]
number() {
    must="a number of at least $3${4:+, at most $4}"
    case $2 in
        '' | *[!0-9]* | 0?* | ??????????*) refuse "$1" "$2" "$must" ;;
    esac
    { [ "$2" -ge "$3" ] && [ "$2" -le "${4:-$2}" ]; } || refuse "$1" "$2" "$must"
}

# choice NAME VALUE CHOICE...
choice() {
    name=$1 value=$2
    shift 2
    for each; do
        [ "$each" != "$value" ] || return 0
    done
    refuse "$name" "$value" "one of: $*"
}

# word NAME VALUE: what needs no quotes, in no file format.
word() {
    case $2 in
        '' | -* | *[!A-Za-z0-9._:/@-]*) refuse "$1" "$2" 'of letters, digits and . _ : / @ -' ;;
    esac
}

# config VALUE: auto, a preset, or what can be read. What is elsewhere is not looked for where THERE is set: a file of an image.
config() {
    of=${1%%:*} presets=auto
    for preset in "${here:?}"/../configs/*.py; do
        preset=${preset##*/}
        presets="$presets ${preset%.py}"
    done
    case " $presets " in
        *" $of "*) return 0 ;;
    esac
    case ${THERE:+there}$of in
        there*[./]*) return 0 ;;
    esac
    { [ -n "$of" ] && [ -r "$of" ]; } || refuse CONFIG "$1" "a file, a run directory, or one of: $presets"
}

# quoted WORD...: one line that a shell reads as these words again.
quoted() {
    quote="'" before=''
    for word; do
        case $word in
            '' | *[!A-Za-z0-9_./:=,@%+-]*)
                printf "%s'" "$before"
                while [ "$word" != "${word#*"$quote"}" ]; do
                    printf '%s%s' "${word%%"$quote"*}" "'\\''"
                    word=${word#*"$quote"}
                done
                printf "%s'" "$word"
                ;;
            *) printf '%s%s' "$before" "$word" ;;
        esac
        before=' '
    done
    echo
}

# told: the variables at the top of this script as they are now, so that a misspelt one is seen not to be among them.
told() {
    set --
    # shellcheck disable=SC2013 # words are what is wanted
    for variable in $(sed -n 's/^\([A-Z]*\)=\${.*/\1/p' "$0"); do
        eval "set -- \"\$@\" \"$variable=\$$variable\""
    done
    echo "# with $(quoted "$@")" >&2
}

# run WORD...: become this command, or print it where DRY_RUN is set, and on stderr what it is made of.
run() {
    if [ -n "${DRY_RUN:-}" ]; then
        told
        quoted "$@"
    else
        exec "$@"
    fi
}
