#!/usr/bin/env bash
# What an image does, without an image, in namespaces of its own: start by ray-node, deploy, probes, an answer, drain.
# $1: virtual environment in which Baton is installed; $2: the repository; $3: empty folder; $4: folder of models.
set -euo pipefail

venv=$1 bin=$2/deploy/images/bin work=$3
ip link set lo up
unset PYTHONPATH
export PATH=$venv/bin:/usr/bin:/bin:/usr/sbin:/sbin HOME=$work RAY_AUTH_MODE=disabled RAY_TMPDIR=$work
export BATON_CONFIG=$work/baton.yaml BATON_FRONT_DIR=$work/front BATON_DRAIN_S=50
cd "$work"
openssl rand -base64 48 >key
chmod 600 key
cat >baton.yaml <<YAML
model: {cache_dir: $4}
prefill: {threads: 1, resources: {prefill: 1}}
decode: {threads: 1, resources: {decode: 1}}
handoff: {transport: tcp}
router: {resources: {router: 1}}
security: {cluster_key_file: $work/key}
YAML
baton config serve --config baton.yaml >serve.yaml
sed -i 's/EveryNode/HeadOnly/' serve.yaml # two nodes, one network namespace

wait_until() {
  for _ in $(seq 120); do
    if "$@"; then return 0; fi
    sleep 1
  done
  echo "never: $*" >&2
  return 1
}

"$bin/ray-node" ray start --head --port=6379 --node-ip-address=127.0.0.1 --num-cpus=2 --resources='{"router": 1}' \
  --object-store-memory=90000000 --dashboard-host=127.0.0.1
"$bin/ray-node" ray start --address=127.0.0.1:6379 --node-ip-address=127.0.0.2 --num-cpus=4 --dashboard-agent-listen-port=52366 \
  --resources='{"prefill": 1, "decode": 1}' --object-store-memory=90000000
wait_until "$bin/ready" head
"$bin/alive"
if "$bin/ready" router; then
  echo "ready before anything is deployed" >&2
  exit 1
fi
serve deploy serve.yaml --address http://127.0.0.1:8265
wait_until "$bin/ready" router
"$bin/ready" prefill
baton generate --address 127.0.0.1:9000 --max-tokens 8 --temperature 0 "The capital of France is"
node=$(python -c 'import ray; ray.init("127.0.0.1:6379", log_to_driver=False)
print(next(n["NodeID"] for n in ray.nodes() if n["NodeManagerAddress"] == "127.0.0.2"))')
"$bin/drain" --address 127.0.0.1:6379 --node-id "$node"
if "$bin/ready" router; then
  echo "ready without workers" >&2
  exit 1
fi
echo "started, ready, answered, drained"
