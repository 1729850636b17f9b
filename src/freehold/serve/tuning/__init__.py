"""Fine-tuning for clients of the server: uploaded files, jobs, and the models that come of them."""
