"""Files in the folder of a run that learns tasks, beside those of trainer/paths.py. Loads without torch."""

RESULT_FILE = "result.json"  # written last: the run is finished
TRAINED_FILE = "trained.safetensors"
