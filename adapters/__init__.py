"""LoRA adapters per task, bundles, prediction, publishing."""
