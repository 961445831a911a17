"""Temporal consistency and motion metrics of clips ``(B, C, T, H, W)`` in [0, 1].

A flow is ``(B, T-1, 2, H, W)`` in pixels, x then y; it is OpenCV's, or given. All but the temporal loss are measures
only, without gradients, one value per clip (:func:`temporal_fid`: one per pair of sets).
"""

from vdcore.metrics.consistency import FlowConsistency, flow_consistency, temporal_flicker, warping_error
from vdcore.metrics.flicker import Flicker, frame_flicker
from vdcore.metrics.flow import Flow, mean_flow, optical_flow, visible, warp
from vdcore.metrics.frechet import FidEstimate, frechet_distance, temporal_fid, temporal_fid_estimate
from vdcore.metrics.temporal_loss import flow_change, lucas_kanade, temporal_loss

__all__ = [
    "FidEstimate",
    "Flicker",
    "Flow",
    "FlowConsistency",
    "flow_change",
    "flow_consistency",
    "frame_flicker",
    "frechet_distance",
    "lucas_kanade",
    "mean_flow",
    "optical_flow",
    "temporal_fid",
    "temporal_fid_estimate",
    "temporal_flicker",
    "temporal_loss",
    "visible",
    "warp",
    "warping_error",
]
