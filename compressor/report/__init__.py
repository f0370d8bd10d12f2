"""What a run says about itself: JSON, terminal, HTML, model card, manifest."""
