"""Configurations of trained methods that fit a test: the paper's with few epochs and narrow networks."""

SMALL_CONFIGS: dict[str, dict[str, object]] = {
    "glass": {"epochs": 20, "batch_size": 4, "hidden_width": 32, "adaptor_lr": 1e-3, "discriminator_lr": 5e-3},
    "cflow": {
        "meta_epochs": 4,
        "sub_epochs": 2,
        "coupling_blocks": 2,
        "condition_width": 8,
        "batch_size": 6,
        "fibres": 64,
        "learning_rate": 5e-3,
        "rotation_degrees": 0.0,
    },
    "uniad": {
        "epochs": 30,
        "batch_size": 4,
        "hidden_width": 16,
        "feedforward_width": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "heads": 2,
        "neighbour_size": 3,
        "learning_rate": 5e-3,
    },
    "tocoad": {
        "guide_epochs": 15,
        "guide_batch_size": 4,
        "contrast_epochs": 5,
        "contrast_batch_size": 6,
        "projector_width": 16,
    },
    "draem": {
        "reconstruction_width": 4,
        "discriminative_width": 8,
        "epochs": 20,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "rotation_probability": 0.0,
        "largest_beta": 0.3,
    },
}
"""Method name -> parameters; a method that is not here is tested with its defaults."""
