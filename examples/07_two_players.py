"""
Two players: which digits, and which earlier fakes, shaped the discriminator's view
===================================================================================

A small deep convolutional GAN is trained on handwritten digits by an ordinary alternating loop, with an R1 penalty and
an average of the generator beside it. Recorded, both players are exact kernel machines: the discriminator's output is a
sum over real digits and over fakes, each of which has the latent and the generator's step that it came from.
"""

import copy

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call
from torch.nn.functional import softplus
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pathkernel as pk

# %%
# Two networks, as people write them
# ----------------------------------

LATENT, BATCH, EPOCHS = 8, 32, 4


def discriminator():
    return nn.Sequential(
        nn.Conv2d(1, 8, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.2),
        nn.Conv2d(8, 16, 4, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.LeakyReLU(0.2),
        nn.Conv2d(16, 1, 2, 1, 0, bias=False),
        nn.Flatten(),
    )


def generator():
    return nn.Sequential(
        nn.ConvTranspose2d(LATENT, 16, 2, 1, 0, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 1, 4, 2, 1, bias=False),
        nn.Tanh(),
    )


torch.manual_seed(0)
images = torch.tensor(load_digits().images[:384] / 8 - 1, dtype=torch.float32)[:, None]
D, G = discriminator(), generator()
opt_d = torch.optim.Adam(D.parameters(), lr=2e-3, betas=(0.5, 0.999))
opt_g = torch.optim.Adam(G.parameters(), lr=2e-3, betas=(0.5, 0.999))
ema = AveragedModel(G, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
untrained = copy.deepcopy(G).eval()

# %%
# The ordinary loop, recorded
# ---------------------------
# Two recorders and a clock. A pass in ``game.sources`` is of samples that are none of the data's; the penalty, whose
# gradient goes round the outputs, has a channel of its own.

players = {"D": (D, opt_d), "G": (G, opt_g)}
with pk.GameRecorder(players, data={"D": (images, torch.ones(384))}, averages={"G": {"ema": ema}}) as game:
    for _ in range(EPOCHS):
        for x, _ in game["D"].batches(BATCH, shuffle=True):
            # the discriminator's step, with R1
            opt_d.zero_grad()
            x.requires_grad_(True)
            z = D(x)
            softplus(-z).mean().backward(retain_graph=True)
            with game["D"].channel("r1"):
                (slope,) = torch.autograd.grad(z.sum(), x, create_graph=True)
                (0.1 * slope.square().sum((1, 2, 3)).mean()).backward()
            with game.sources(D="generated", G="noise"):
                fake = G(torch.randn(BATCH, LATENT, 1, 1))
                softplus(D(fake.detach())).mean().backward()
                opt_d.step()
                # the generator's step
                opt_g.zero_grad()
                softplus(-D(fake)).mean().backward()
                opt_g.step()
            ema.update_parameters(G)
print(game)

# %%
# Both players are exact machines
# -------------------------------
# Residuals and the errors of the split are at the rounding of float32. Of the generator, the pixel is explained that
# training has changed most.

D.eval()
G.eval()
latent = torch.randn(1, LATENT, 1, 1)
with torch.no_grad():
    queries = torch.cat([images[:1], ema.module.eval()(latent)])
    pixel = int((G(latent) - untrained(latent)).abs().argmax())
view = game.machine("D").explain(queries)
made = game.machine("G").explain(latent, outputs=pixel)
averaged = game.machine("G", average="ema").explain(latent, outputs=pixel)
for name, why in (("discriminator", view), ("generator", made), ("average of the generator", averaged)):
    print(f"{name:<25} residual {why.relative_residual:.1e}, split error {why.split_error:.1e}")

# %%
# Who shaped the discriminator's view of a digit?
# -----------------------------------------------
# Real digits that are like it raised the output, and fakes that came near it lowered it. Under each fake stands the
# step of the generator that it came from; on the right, all fakes by their time.

fakes = game.samples("D", "generated")
origins = game.origins("D")["generated"]
for query, title in enumerate(("a real digit", "a sample of the averaged generator")):
    display = pk.plotting.PlayerViewDisplay.from_attributions(
        view, query, images, fakes, origins, query_image=queries[query], title=f"The discriminator's view of {title}"
    )
    display.plot(cmap="gray_r")

# %%
# The generator's output is a sum over latents
# --------------------------------------------
# One pixel of a sample, and the latents of training whose samples moved it most.

noise = game.samples("G", "noise").flatten(1)
nearness = torch.nn.functional.cosine_similarity(latent.flatten(), noise).numpy()
figure, panel = plt.subplots(figsize=(5, 3.5), layout="constrained")
panel.plot(nearness, made.shares[0], ".", markersize=3)
panel.set(xlabel="cosine between the two latents", ylabel="share in the pixel", title="Latents that moved one pixel")

# %%
# Checks
# ------
# Exact sums; and each fake is what the generator made of its latent at its step. (BatchNorm couples the samples of a
# batch: they are made again together.)

for why in (view, made, averaged):
    assert why.relative_residual < 1e-4
    assert why.split_error < 1e-4
    assert why.samples_checked == 1
with torch.no_grad():
    assert np.allclose(view.output, D(queries)[:, 0].numpy(), atol=1e-4)
    assert np.allclose(made.output, G(latent).flatten(1)[:, pixel].numpy(), atol=1e-4)
assert origins.known.all()
for step in (0, 40):
    rows = origins.made_at == step
    theta = game.trajectory("G").parameters(step)
    again = functional_call(generator(), dict(theta), (origins.latents[rows],))
    assert torch.allclose(again, fakes[rows], atol=1e-5)
