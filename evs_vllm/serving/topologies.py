# SPDX-License-Identifier: Apache-2.0
"""The ways to deploy a server, and what is known of each: one table for the tests (tests/deploy) and the documentation.

A row whose state is "run" has a test of its name that starts it on CPU engines and compares its answers with those of
one process, tokens and logprobs (``make test-deploy``); one that says "interface" has a test of what that topology
calls, and says why no engine was run.
"""

from dataclasses import dataclass
from typing import Literal

State = Literal["run", "interface", "refused"]

STATES: dict[State, str] = {
    "run": "run here",
    "interface": "interface tested",
    "refused": "refused",
}


@dataclass(frozen=True, kw_only=True)
class Topology:
    """One way to deploy.

    Attributes:
        name: What its test and its row of the result file are called.
        title: In the words of the documentation.
        how: Options or processes, in Markdown.
        state: What was done with it; see `STATES`.
        notes: What to know; for other states than "run" the reason.
    """

    name: str
    title: str
    how: str
    state: State
    notes: str


TOPOLOGIES: tuple[Topology, ...] = (
    Topology(
        name="api_servers",
        title="several API servers",
        how="`--api-server-count 2`",
        state="run",
        notes="Each process has a processor cache and a stream store of its own. A conversation that reaches another "
        "process is planned again there from the videos that it holds: the same answer, at the cost of a first turn.",
    ),
    Topology(
        name="tensor_parallel",
        title="tensor parallelism",
        how="`--tensor-parallel-size 2`",
        state="run",
        notes="The plan reaches all ranks with the clip's other fields.",
    ),
    Topology(
        name="data_parallel",
        title="data parallelism",
        how="`--data-parallel-size 2`",
        state="run",
        notes="Starts as many API servers as ranks, if not told otherwise.",
    ),
    Topology(
        name="headless",
        title="a second, headless node",
        how="`--headless --data-parallel-start-rank 1` beside a first node, both on one machine",
        state="run",
        notes="Both nodes need the same `--evs-*` options.",
    ),
    Topology(
        name="replicas",
        title="replicas behind a router",
        how="two servers; the router of the test goes by `evs_vllm.serving.routing_key`",
        state="run",
        notes="Each conversation stays with one replica, and nothing of a stream is made again.",
    ),
    Topology(
        name="shm_cache",
        title="processor cache in shared memory",
        how="`--mm-processor-cache-type shm`",
        state="run",
        notes="The scheduler does not see plans there, so a request is refused whose kept positions would not fit with "
        "the whole context ([limits](limits.md#positions)).",
    ),
    Topology(
        name="tensor_ipc",
        title="tensors of media in shared memory",
        how="`--mm-tensor-ipc torch_shm` with `VLLM_WORKER_MULTIPROC_METHOD=spawn`",
        state="run",
        notes="For one engine of one rank, as vLLM says.",
    ),
    Topology(
        name="encoder",
        title="an encoder apart (EPD)",
        how="`--ec-transfer-config`, roles `ec_producer` and `ec_consumer`; both get the request with its media",
        state="run",
        notes="Both plan the clip and come to the same identifier, under which the rows are stored. Send the videos "
        "of a stream to the encoder in one request: alone, a later one is another clip with another identifier.",
    ),
    Topology(
        name="encoder_metadata",
        title="an encoder apart, consumers without pixels",
        how="as above; the consumer gets what the encoder answered (`ec_transfer_params`) in place of media",
        state="run",
        notes="The plan (`evs_plan`) is among what the encoder answers; without it the consumer refuses the request "
        "with HTTP 400.",
    ),
    Topology(
        name="prefill_decode",
        title="prefill and decode apart (PD)",
        how="`--kv-transfer-config`, roles `kv_producer` and `kv_consumer`; both get the request with its media",
        state="run",
        notes="vLLM's ExampleConnector. Stored blocks are keyed by tokens and identifiers, which hold the settings.",
    ),
    Topology(
        name="lora",
        title="LoRA adapters of the language model",
        how="`--enable-lora`",
        state="run",
        notes="Compared with a server of the merged weights. Adapters of the vision tower "
        "(`--enable-tower-connector-lora`) are refused.",
    ),
    Topology(
        name="weight_reload",
        title="new weights in a running engine",
        how="`reload_weights` by `collective_rpc`, then `reset_encoder_cache` and `reset_prefix_cache`",
        state="run",
        notes="Plans depend on pixels and settings alone, so the processor cache and streams stay valid. Without "
        "`reset_encoder_cache` the engine ends at the next clip that it knows: vLLM's worker has dropped the rows, its "
        "scheduler does not know.",
    ),
    Topology(
        name="sleep",
        title="sleep and wake",
        how="`--enable-sleep-mode`",
        state="interface",
        notes="vLLM's sleep mode needs a GPU, and its CPU worker ignores the call. Run here: the engine core's part "
        "(it pauses, drops its caches and goes on). Level 2 gives up buffers, so a test checks that the wrapped model "
        "holds no tensors beside vLLM's.",
    ),
    Topology(
        name="ray",
        title="Ray executor",
        how="`--distributed-executor-backend ray`",
        state="interface",
        notes='vLLM refuses Ray on its CPU platform: "current platform cpu does not support ray" (tried with 2.60). '
        "Tested: the pickled configuration brings the settings to a process that has loaded the plugin and nothing "
        "else. The plugin has to be installed on every node.",
    ),
    Topology(
        name="pipeline_parallel",
        title="pipeline parallelism",
        how="`--pipeline-parallel-size 2`",
        state="interface",
        notes="Without this package, too, vLLM 0.32's CPU engine ends at the start with two stages. Tested: a stage "
        "without a tower is built, and computes the positions from the plan.",
    ),
    Topology(
        name="rust_frontend",
        title="the Rust frontend",
        how="`VLLM_USE_RUST_FRONTEND=1`",
        state="refused",
        notes="It runs no Python processor, so clips would be served unpruned.",
    ),
)
