"""Where an adapter goes: a model repository of the Hugging Face hub, with a card that says what it is."""
