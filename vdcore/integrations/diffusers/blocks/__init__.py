"""What hosts have around attention, on vdcore's operators: adaptive norms, gated residuals, patches, images."""
