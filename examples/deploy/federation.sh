#!/usr/bin/env bash
# A federation on one machine: a SuperLink with TLS and node authentication, three SuperNodes.
#     federation.sh keys       make a certificate authority, the server's certificate, node keys
#     federation.sh start      start the SuperLink, let the nodes in, start them
#     federation.sh run        run the app; what it says is shown until it ends
#     federation.sh status     nodes and runs
#     federation.sh stop       stop everything that start started
#     federation.sh superlink  start the SuperLink only, as after it has stopped
#     federation.sh node N     let node N in if it is new, and start it
# Everything is below $DEPLOY (default: ./deployment). The SuperLink listens at $HOST (default:
# 127.0.0.1, loopback) and $PORT (default: 8000); nodes reach it at $FLEET (default: there).
set -euo pipefail

HERE=$(cd "$(dirname "$0")" && pwd)
DEPLOY=$(realpath -m "${DEPLOY:-deployment}")
APP=${APP:-$HERE/app}
HOST=${HOST:-127.0.0.1}
PORT=${PORT:-8000}
FLEET=${FLEET:-$HOST:$PORT}
NODES=${NODES:-3}
export FLWR_HOME=$DEPLOY/flwr FLWR_TELEMETRY_ENABLED=0
# The packages are installed on every machine beforehand; Flower must not fetch them at each run.
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
# SuperExecs ask for work every second, which alone keeps a small machine with all nodes busy.
export FLWR_SUPEREXEC_TASK_POLL_INTERVAL=4

fail() {
    echo "$1" >&2
    exit 1
}

quietly() {  # COMMAND...: what it says is shown only if it fails
    local said
    said=$("$@" 2>&1) || fail "$said"
}

keys() {
    [ ! -e "$DEPLOY/keys/ca.key" ] || fail "there are keys in $DEPLOY/keys already"
    mkdir -p "$DEPLOY/keys" && cd "$DEPLOY/keys"
    umask 077
    local names="DNS:localhost,IP:127.0.0.1"
    case $HOST in
        127.0.0.1 | localhost) ;;
        *[!0-9.]*) names+=",DNS:$HOST" ;;
        *) names+=",IP:$HOST" ;;
    esac
    quietly openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -days 365 \
        -subj "/CN=fedexlora example CA" -addext "keyUsage=critical,keyCertSign,cRLSign" \
        -keyout ca.key -out ca.crt
    quietly openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -subj "/CN=localhost" \
        -keyout server.key -out server.csr
    printf 'subjectAltName=%s\nbasicConstraints=CA:FALSE\n' "$names" > server.ext
    quietly openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 \
        -extfile server.ext -out server.crt
    chmod 644 ca.crt server.crt
    for i in $(seq "$NODES"); do
        ssh-keygen -q -t ecdsa -b 384 -N "" -C "node-$i" -f "node-$i"
    done
    echo "keys of one CA, one server and $NODES nodes: $DEPLOY/keys"
}

command_of() {  # PID: of a process that runs; nothing otherwise
    tr '\0' ' ' < "/proc/$1/cmdline"
} 2>/dev/null

children_of() {  # PID
    awk -v parent="$1" '/^Pid:/ { pid = $2 } /^PPid:/ && $2 == parent { print pid }' \
        /proc/[0-9]*/status || true  # a process may end while it is looked at
} 2>/dev/null

running() {  # NAME: whether what was launched under this name still runs
    local pid
    pid=$(cat "$DEPLOY/pid/$1" 2>/dev/null) && [[ $(command_of "$pid") == *flower-super* ]]
}

launch() {  # NAME COMMAND...: in the background, with its log and its process id
    local name=$1; shift
    ! running "$name" || fail "$name is running already; 'federation.sh stop' stops everything"
    nohup "$@" > "$DEPLOY/log/$name.log" 2>&1 &
    echo $! > "$DEPLOY/pid/$name"
}

superlink() {
    command -v flower-superlink > /dev/null || fail "flower-superlink is not on the PATH"
    [ -e "$DEPLOY/keys/server.crt" ] || fail "there are no keys in $DEPLOY/keys: 'federation.sh keys'"
    mkdir -p "$DEPLOY/log" "$DEPLOY/pid" "$FLWR_HOME"
    cat > "$FLWR_HOME/config.toml" <<END
[superlink]
default = "deployed"

[superlink.deployed]
address = "$HOST:$PORT"
root-certificates = "$DEPLOY/keys/ca.crt"
END
    launch superlink flower-superlink --host "$HOST" --port "$PORT" \
        --database "$DEPLOY/superlink.db" --enable-supernode-auth \
        --ssl-ca-certfile "$DEPLOY/keys/ca.crt" \
        --ssl-certfile "$DEPLOY/keys/server.crt" --ssl-keyfile "$DEPLOY/keys/server.key"
    for _ in $(seq 120); do
        sleep 1
        running superlink || fail "the SuperLink has ended: $(tail -n 5 "$DEPLOY/log/superlink.log")"
        if flwr ls deployed > "$DEPLOY/log/ls.log" 2>&1; then return; fi
    done
    fail "the SuperLink does not answer; see $DEPLOY/log"
}

node() {
    local i=$1
    if [ ! -e "$DEPLOY/node-$i.toml" ]; then
        flwr supernode register "$DEPLOY/keys/node-$i.pub" deployed --name "node-$i"
        sed "s|@DEPLOY@|$DEPLOY|; s|@NODE@|$i|; s|@SHARE@|$((i - 1))|; s|@HERE@|$PWD|" \
            "$HERE/node.toml" > "$DEPLOY/node-$i.toml"
    fi
    launch "node-$i" flower-supernode --superlink "$FLEET" --port $((PORT + 1000 + i)) \
        --root-certificates "$DEPLOY/keys/ca.crt" \
        --auth-supernode-private-key "$DEPLOY/keys/node-$i" \
        --node-config "fedexlora-node=\"$DEPLOY/node-$i.toml\""
}

start() {
    superlink
    for i in $(seq "$NODES"); do node "$i"; done
    echo "SuperLink and $NODES SuperNodes are running; logs: $DEPLOY/log"
}

run() {
    flwr run "$APP" deployed --stream --run-config "out=\"$DEPLOY/run\" nodes=$NODES" "$@"
    # Flower exits with 0 however the run ended.
    if ! flwr ls deployed --limit 1 --format json | grep '"status": "finished:completed"' > /dev/null
    then
        echo "the run has stopped; 'federation.sh run' goes on after its last finished round" >&2
        return 1
    fi
}

stop() {
    local ended=() left
    for name in $(cd "$DEPLOY/pid" 2>/dev/null && ls); do
        if running "$name"; then
            ended+=("$(cat "$DEPLOY/pid/$name")")
            # Its SuperExec, which goes by itself when it misses its parent, but not at once.
            for child in $(children_of "${ended[-1]}"); do ended+=("$child"); done
        fi
        rm -f "$DEPLOY/pid/$name"
    done
    for file in "$DEPLOY"/home/*/worker.pid; do
        [ -e "$file" ] || continue
        if [[ $(command_of "$(cat "$file")") == *fedexlora.flower.worker* ]]; then
            ended+=("$(cat "$file")")
        fi
        rm -f "$file"
    done
    for pid in "${ended[@]}"; do kill "$pid" 2>/dev/null || true; done
    for _ in $(seq 60); do
        left=""
        for pid in "${ended[@]}"; do [ -z "$(command_of "$pid")" ] || left+=" $pid"; done
        [ -n "$left" ] || { echo stopped; return; }
        sleep 0.5
    done
    fail "still running after 30 s:$left"
}

case ${1:-} in
    keys | start | stop | superlink) "$1" ;;
    node) node "${2:?which node?}" ;;
    run) run "${@:2}" ;;
    status) flwr supernode ls deployed && flwr ls deployed ;;
    *) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
