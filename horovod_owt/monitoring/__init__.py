"""Monitoring of a run: TensorBoard files, Prometheus metrics, alert rules and a dashboard."""
