# What the scripts beside this file share; they source it from the repository's root.

# One line about what is going on, on standard error so that output stays usable.
say() {
    echo "${0##*/}: $*" >&2
}

# One sentence, and the end.
fail() {
    say "$*"
    exit 1
}
