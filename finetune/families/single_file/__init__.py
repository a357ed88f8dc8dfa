"""Single-file checkpoints as base models.

``layouts`` says what is where in a file, ``checkpoint`` recognises one, ``template`` finds what a diffusers folder says
beside weights, out of ``published`` where nobody says it, and ``convert`` makes a diffusers folder of it all.
``finetune.export.single_file`` goes the other way.
"""
