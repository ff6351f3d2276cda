"""Loading models.

model      `load_model`, for a model and its tokenizer
options    `LoadOptions`: how a model is loaded; model_kwargs, attention, quantisation
overrides  values of a model's configuration that the user changes
source     the files of a model: on the hub, in a folder, or in a .gguf file
folders    what is wrong with a folder, in one line
adapters   PEFT adapters and their base models
"""
