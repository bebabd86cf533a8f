"""The figures of a run: records in metrics.jsonl, and a Prometheus endpoint on every node.

record        one line of metrics.jsonl, and the progress line
catalogue     every metric of the endpoint
instruments   what a rank counts
endpoint      what a node serves
writers       TensorBoard and Weights & Biases
accelerators  peaks, memory, sensors
"""
