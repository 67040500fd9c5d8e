"""Recovery: a chat model that was fine-tuned on a narrow task gets its manners back from the model that it was made from."""
