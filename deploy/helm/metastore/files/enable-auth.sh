# Makes the user root and turns authentication on, over the JSON API, unless it is on already. Run by a job of the chart:
# ENDPOINT is a URL of the cluster, PASSWORD_FILE has the password of root, TLS says whether /secrets has certificates.
set -eu

# Prints the answer, and returns 0 where it was a success.
call() { # the path, the body
    if [ "$TLS" = true ]; then
        set -- "$@" --cacert "${SECRETS:-/secrets}/ca/ca.crt" --cert "${SECRETS:-/secrets}/client/tls.crt" \
            --key "${SECRETS:-/secrets}/client/tls.key"
    fi
    path=$1 body=$2
    shift 2
    # The body comes from stdin, because the password must not be seen in the list of processes.
    printf '%s' "$body" | curl --silent --show-error --max-time 30 --fail-with-body "$@" --data-binary @- "$ENDPOINT/v3/auth/$path"
}

# The same, where the answer may also be that it exists.
ensure() {
    answer=$(call "$@") && return
    case $answer in
    *'already exists'*) ;;
    *) echo "$1: $answer" >&2 && return 1 ;;
    esac
}

password=$(sed -e 's/\\/\\\\/g' -e 's/"/\\"/g' "$PASSWORD_FILE")
[ -n "$password" ] || { echo "the password of root is empty" >&2; exit 1; }

# Once authentication is on, a client without a token may not ask, and one whose certificate has a common name may not use the
# JSON API at all: both answers say that it is on.
status=$(call status '{}' 2>/dev/null) || true
case $status in
*'"enabled":true'* | *'user name is empty'* | *'CommonName of client'*) echo "authentication is on already"; exit 0 ;;
*'"header"'*) ;;
*) echo "the state of authentication is unknown: $(call status '{}' 2>&1)" >&2; exit 1 ;;
esac
ensure user/add "{\"name\":\"root\",\"password\":\"$password\"}"
ensure role/add '{"name":"root"}'
ensure user/grant '{"user":"root","role":"root"}'
call enable '{}' >/dev/null
echo "authentication is on; the user root has the password of the secret"
