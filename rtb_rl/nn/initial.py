"""First weights of a foreign network, from a generator of one's own."""

from torch import Generator, nn


def initialise(network: nn.Module, *, generator: Generator) -> None:
    """Draw the weights and biases of all linear and convolutional layers anew.

    Uniform within +-1 / sqrt(inputs of a unit), as torch's own layers start; other parameters
    (norms start at one and zero) stay.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            bound = layer.weight[0].numel() ** -0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            if layer.bias is not None:
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
