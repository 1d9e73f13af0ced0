"""The five dashboards. Tests hold that every metric they name is exported, and that Prometheus takes every query."""

from __future__ import annotations

from deploy.monitoring.panels import Dashboard, Panel, Query, Row, grown, held, one, per_second, quantiles, share

TTFT = "gen_ai_server_time_to_first_token_seconds"
TPOT = "gen_ai_server_time_per_output_token_seconds"
DURATION = "gen_ai_server_request_duration_seconds"
REFUSED = '{outcome="refused"}'
PREFIX = "baton_worker_prefix"
WORKER = "{{role}} {{worker}}"

GOODPUT = Dashboard(
    "goodput",
    "goodput",
    "Requests that kept what their class promises, and what they brought.",
    (
        Row(
            "Now",
            (
                Panel(
                    "Goodput",
                    "percentunit",
                    one(share("baton_slo_kept_total", "baton_slo_requests_total")),
                    "Share of requests that met their class's objectives; refused and failed ones missed them.",
                    single=True,
                ),
                Panel("Kept per second", "reqps", one(per_second("baton_slo_kept_total")), single=True),
                Panel("Output tokens per second", "ops", one(per_second("baton_router_tokens_total")), single=True),
                Panel("In flight", "short", one("sum(baton_router_inflight)"), single=True),
                Panel(
                    "Workers ready", "short", one("max by (role) (baton_pool_workers_ready)", "{{role}}"), single=True
                ),
            ),
        ),
        Row(
            "Promises",
            (
                Panel(
                    "Goodput by class",
                    "percentunit",
                    one(share("baton_slo_kept_total", "baton_slo_requests_total", "slo_class"), "{{slo_class}}"),
                ),
                Panel(
                    "Requests by class",
                    "reqps",
                    (
                        Query(per_second("baton_slo_requests_total", "slo_class"), "{{slo_class}}"),
                        Query(per_second("baton_slo_kept_total", "slo_class"), "{{slo_class}} kept"),
                    ),
                ),
                Panel(
                    "Objectives",
                    "s",
                    one("max by (slo_class, objective) (baton_slo_seconds)", "{{slo_class}} {{objective}}"),
                ),
            ),
        ),
        Row(
            "Work",
            (
                Panel(
                    "Requests by outcome",
                    "reqps",
                    one(per_second("baton_router_requests_total", "outcome"), "{{outcome}}"),
                    stacked=True,
                ),
                Panel(
                    "Tokens per second",
                    "ops",
                    (
                        Query(per_second("baton_router_tokens_total"), "output, as sent"),
                        Query(per_second("baton_request_prompt_tokens_sum"), "prompt, of requests that ended"),
                        Query(per_second("baton_request_output_tokens_sum"), "output, of requests that ended"),
                    ),
                ),
                Panel(
                    "In flight and waiting",
                    "short",
                    (
                        Query("sum(baton_router_inflight)", "in flight"),
                        Query("sum(baton_router_waiting)", "waiting at the router"),
                    ),
                ),
            ),
        ),
    ),
)

LATENCY = Dashboard(
    "latency",
    "time to tokens, by stage",
    "What clients wait for, and on which stage of a request's life.",
    (
        Row(
            "What clients see",
            (
                Panel("Time to first token", "s", quantiles(TTFT)),
                Panel("Time per output token", "s", quantiles(TPOT), "Mean of each output after its first token."),
                Panel("Arrival to last token", "s", quantiles(DURATION)),
            ),
        ),
        Row(
            "Where it goes",
            (
                Panel(
                    "Mean seconds per output, by stage",
                    "s",
                    one(
                        f"{per_second('baton_stage_seconds_sum', 'stage')} / ignoring (stage) group_left ()"
                        f" {per_second(f'{DURATION}_count')}",
                        "{{stage}}",
                    ),
                    "Adds up to the mean time from arrival to last token.",
                    stacked=True,
                ),
                Panel("p90 of each stage", "s", quantiles("baton_stage_seconds", "stage", of=(0.9,))),
            ),
        ),
        Row(
            "What is asked",
            (
                Panel("Prompt tokens", "short", quantiles("baton_request_prompt_tokens", of=(0.5, 0.9))),
                Panel("Output tokens", "short", quantiles("baton_request_output_tokens", of=(0.5, 0.9))),
                Panel("First tokens, chats and completions", "s", quantiles(TTFT, "gen_ai_operation_name", of=(0.9,))),
            ),
        ),
    ),
)

POOLS = Dashboard(
    "pools",
    "pools and workers",
    "What each worker holds. Everything but caches returns to zero when nothing is in flight.",
    (
        Row(
            "Workers",
            (
                Panel("Ready", "short", one("max by (role) (baton_pool_workers_ready)", "{{role}}")),
                Panel("Ready, each", "short", one(held("baton_worker_ready"), WORKER)),
                Panel(
                    "Age of the last report", "s", one("min by (role, worker) (baton_worker_load_age_seconds)", WORKER)
                ),
            ),
        ),
        Row(
            "Lines",
            (
                Panel("Sequences running", "short", one(held("baton_worker_running"), WORKER)),
                Panel("Sequences waiting", "short", one(held("baton_worker_waiting"), WORKER)),
                Panel("Prompt tokens waiting", "short", one(held("baton_worker_waiting_tokens"), WORKER)),
            ),
        ),
        Row(
            "Memory",
            (
                Panel(
                    "KV pages in use",
                    "percentunit",
                    one(f"{held('baton_worker_pages_used')} / {held('baton_worker_pages_total')}", WORKER),
                ),
                Panel("KV pages cached", "short", one(held("baton_worker_pages_cached"), WORKER)),
                Panel(
                    "Prefix cache hits",
                    "percentunit",
                    one(
                        f"{grown(f'{PREFIX}_hit_tokens_total')} / {grown(f'{PREFIX}_lookup_tokens_total')}",
                        WORKER,
                    ),
                    "Share of prompt tokens whose KV was found.",
                ),
                Panel(
                    "Preemptions",
                    "ops",
                    one(grown("baton_worker_preemptions_total"), WORKER),
                    "Sequences that lost their pages and were computed again.",
                ),
            ),
        ),
        Row(
            "Speed",
            (
                Panel("Seconds per prompt token", "s", one(held("baton_worker_prompt_token_s"), WORKER)),
                Panel(
                    "Seconds per decode step",
                    "s",
                    (
                        Query(held("baton_worker_step_s"), f"{WORKER} step"),
                        Query(held("baton_worker_sequence_s"), f"{WORKER} per sequence"),
                    ),
                ),
            ),
        ),
    ),
)

HANDOFF = Dashboard(
    "handoff",
    "handoff",
    "KV on its way from prefill to decode: what carries it, in which form, and what of it clients wait for.",
    (
        Row(
            "Ways",
            (
                Panel(
                    "Handoffs by carrier",
                    "ops",
                    one(per_second("baton_handoffs_total", "transport", "carrier"), "{{transport}}: {{carrier}}"),
                    "The carrier is what the transport itself says it uses.",
                ),
                Panel(
                    "Bytes by carrier",
                    "Bps",
                    one(per_second("baton_handoff_bytes_total", "transport", "carrier"), "{{transport}}: {{carrier}}"),
                ),
                Panel(
                    "Handoffs by codec",
                    "ops",
                    one(per_second("baton_handoffs_total", "codec"), "{{codec}}"),
                    stacked=True,
                ),
                Panel(
                    "KV by codec",
                    "ops",
                    one(per_second("baton_handoff_codec_tokens_total", "codec"), "{{codec}}"),
                    "Layers times tokens.",
                    stacked=True,
                ),
            ),
        ),
        Row(
            "Time",
            (
                Panel(
                    "Waited for",
                    "percentunit",
                    one(share("baton_handoff_exposed_seconds_total", "baton_handoff_busy_seconds_total")),
                    "Share of encode, wire and land that prefill did not hide.",
                ),
                Panel(
                    "p90 of encode, wire, land",
                    "s",
                    one(
                        "histogram_quantile(0.9, "
                        + per_second(
                            "baton_stage_seconds_bucket", "le", "stage", where='{stage=~"encode|wire|land|wait"}'
                        )
                        + ")",
                        "{{stage}}",
                    ),
                ),
                Panel(
                    "Bytes per handoff",
                    "bytes",
                    one(f"{per_second('baton_handoff_bytes_total')} / {per_second('baton_handoffs_total')}"),
                ),
            ),
        ),
        Row(
            "Buffers",
            (
                Panel("Handoffs under way", "short", one(held("baton_worker_handoffs"), WORKER)),
                Panel(
                    "Staging and landing in use",
                    "percentunit",
                    one(
                        f"{held('baton_worker_buffer_bytes_used')} / {held('baton_worker_buffer_bytes_total')}", WORKER
                    ),
                ),
                Panel(
                    "Quarantined",
                    "bytes",
                    one(held("baton_worker_buffer_bytes_quarantined"), WORKER),
                    "Set aside after an aborted transfer until its peer can no longer write there.",
                ),
            ),
        ),
    ),
)

REJECTIONS = Dashboard(
    "rejections",
    "rejections, failures, retries",
    "Requests that did not go the straight way, and why.",
    (
        Row(
            "Requests",
            (
                Panel(
                    "Rejected, by reason",
                    "reqps",
                    one(per_second("baton_router_rejections_total", "reason"), "{{reason}}"),
                    stacked=True,
                ),
                Panel(
                    "Failed, by code",
                    "reqps",
                    one(per_second("baton_router_failures_total", "code"), "{{code}}"),
                    stacked=True,
                ),
                Panel(
                    "Tried again, by reason",
                    "ops",
                    one(per_second("baton_router_retries_total", "reason"), "{{reason}}"),
                    stacked=True,
                ),
            ),
        ),
        Row(
            "Shares",
            (
                Panel(
                    "Refused",
                    "percentunit",
                    one(
                        f"{per_second('baton_router_requests_total', where=REFUSED)} / "
                        f"{per_second('baton_router_requests_total')}"
                    ),
                ),
                Panel("Waiting at the router", "short", one("sum by (router) (baton_router_waiting)", "{{router}}")),
            ),
        ),
        Row(
            "Strangers",
            (
                Panel("Calls without a good API key", "ops", one(per_second("baton_router_unauthenticated_total"))),
                Panel(
                    "Connections that did not prove the cluster key",
                    "ops",
                    one(grown("baton_worker_connections_refused_total"), WORKER),
                ),
            ),
        ),
    ),
)

DASHBOARDS = (GOODPUT, LATENCY, POOLS, HANDOFF, REJECTIONS)
