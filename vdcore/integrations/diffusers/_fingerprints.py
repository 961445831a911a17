"""The functions of diffusers that vdcore replaces, each by the digest of the source that the replacement was read from.

``tests/integrations/test_diffusers_source.py`` says which are missing or differ with the installed version.
"""

FINGERPRINTS: dict[str, str] = {
    "diffusers.models.attention.BasicTransformerBlock.forward": "440071576ac5",
    "diffusers.models.attention.TemporalBasicTransformerBlock.forward": "7eafa694dd59",
    "diffusers.models.attention_processor.AttnProcessor2_0.__call__": "bf23ea5ae404",
    "diffusers.models.attention_processor.FusedAttnProcessor2_0.__call__": "dd3113114595",
    "diffusers.models.resnet.AlphaBlender.forward": "10849f2751d5",
    "diffusers.models.transformers.latte_transformer_3d.LatteTransformer3DModel.forward": "3af3ffe0c53f",
    "diffusers.models.transformers.transformer_temporal.TransformerSpatioTemporalModel.forward": "d8df8cea5b87",
    "diffusers.models.transformers.transformer_temporal.TransformerTemporalModel.forward": "8c42c7d72681",
    "diffusers.models.unets.unet_motion_model.AnimateDiffTransformer3D.forward": "9e7dfe4385fb",
}
