"""Floor 0: what every stage stands on. Imports no torch, ray, vllm or airflow."""
