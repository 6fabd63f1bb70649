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
# 127.0.0.1, loopback) and $PORT (default: 8000).
set -euo pipefail

HERE=$(cd "$(dirname "$0")" && pwd)
DEPLOY=$(realpath -m "${DEPLOY:-deployment}")
APP=${APP:-$HERE/app}
HOST=${HOST:-127.0.0.1}
PORT=${PORT:-8000}
NODES=${NODES:-3}
export FLWR_HOME=$DEPLOY/flwr FLWR_TELEMETRY_ENABLED=0
# The packages are installed on every machine beforehand; Flower must not fetch them at each run.
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
# SuperExecs ask for work every second, which alone keeps a small machine with all nodes busy.
export FLWR_SUPEREXEC_TASK_POLL_INTERVAL=4

keys() {
    mkdir -p "$DEPLOY/keys" && cd "$DEPLOY/keys"
    umask 077
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -days 365 \
        -subj "/CN=fedexlora example CA" -addext "keyUsage=critical,keyCertSign,cRLSign" \
        -keyout ca.key -out ca.crt 2>/dev/null
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -subj "/CN=localhost" \
        -keyout server.key -out server.csr 2>/dev/null
    printf 'subjectAltName=DNS:localhost,IP:%s\nbasicConstraints=CA:FALSE\n' "$HOST" > server.ext
    openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 \
        -extfile server.ext -out server.crt 2>/dev/null
    for i in $(seq "$NODES"); do
        rm -f "node-$i" "node-$i.pub"
        ssh-keygen -q -t ecdsa -b 384 -N "" -C "node-$i" -f "node-$i"
    done
    echo "keys of one CA, one server and $NODES nodes: $DEPLOY/keys"
}

launch() {  # NAME COMMAND...: in the background, with its log and its process id
    local name=$1; shift
    nohup "$@" > "$DEPLOY/log/$name.log" 2>&1 &
    echo $! > "$DEPLOY/pid/$name"
}

superlink() {
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
        if flwr ls deployed > "$DEPLOY/log/ls.log" 2>&1; then return; fi
        sleep 1
    done
    echo "the SuperLink does not answer; see $DEPLOY/log" >&2
    return 1
}

node() {
    local i=$1
    if [ ! -e "$DEPLOY/node-$i.toml" ]; then
        flwr supernode register "$DEPLOY/keys/node-$i.pub" deployed --name "node-$i"
        sed "s|@DEPLOY@|$DEPLOY|; s|@NODE@|$i|; s|@SHARE@|$((i - 1))|; s|@HERE@|$PWD|" \
            "$HERE/node.toml" > "$DEPLOY/node-$i.toml"
    fi
    launch "node-$i" flower-supernode --superlink "$HOST:$PORT" --port $((PORT + 1000 + i)) \
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
    for file in "$DEPLOY"/pid/node-* "$DEPLOY"/pid/superlink "$DEPLOY"/home/*/worker.pid; do
        if [ -e "$file" ]; then kill "$(cat "$file")" 2>/dev/null || true; rm -f "$file"; fi
    done
    echo stopped
}

case ${1:-} in
    keys | start | stop | superlink) "$1" ;;
    node) node "${2:?which node?}" ;;
    run) run "${@:2}" ;;
    status) flwr supernode ls deployed && flwr ls deployed ;;
    *) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
