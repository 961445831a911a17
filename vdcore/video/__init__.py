"""Clips: video files in and out, contact sheets, and synthetic scenes with known motion and occlusion.

A clip is ``(3, T, H, W)`` and a batch of clips ``(B, 3, T, H, W)``, float32 RGB in [0, 1].
"""

from vdcore.video.files import contact_sheet, read_clip, real_clips, real_windows, write_video
from vdcore.video.render import Background, Layers, Scene
from vdcore.video.scenes import MovingShapes

__all__ = [
    "Background",
    "Layers",
    "MovingShapes",
    "Scene",
    "contact_sheet",
    "read_clip",
    "real_clips",
    "real_windows",
    "write_video",
]
