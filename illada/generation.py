class MaskedDiffusionGenerationMixin:
    pass
