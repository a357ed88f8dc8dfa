"""Single-file checkpoints as base models.

``layouts`` says what is where in a file, ``checkpoint`` recognises one, ``network`` finds a network's weights in it,
``template`` what a diffusers folder says beside weights, from a model's ``origin`` or as ``published``, and ``convert``
makes a folder of it all. ``finetune.export.single_file`` goes the other way.
"""
