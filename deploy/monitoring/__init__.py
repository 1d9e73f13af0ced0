"""What operators watch a cluster with: Grafana dashboards made here, Prometheus rules, a configuration to begin with.

``python -m deploy.monitoring`` writes the dashboards to ``grafana/``; docs/operations.md says how to use all of it.
"""
