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

# run WORD...: become this command, or print it where DRY_RUN is set.
run() {
    if [ -n "${DRY_RUN:-}" ]; then
        quoted "$@"
    else
        exec "$@"
    fi
}
