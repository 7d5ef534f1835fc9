"""The model over HTTP, with the APIs of Moondream, Roboflow Inference, OpenAI and fal. `app.py` is the entry point."""
