"""What others watch a run by: TensorBoard's files, Prometheus's metrics, alert rules and a dashboard."""
