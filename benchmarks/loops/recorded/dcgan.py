"""A deep convolutional GAN with BatchNorm in both networks, in the manner of pytorch/examples, dcgan/main.py.

https://github.com/pytorch/examples/blob/main/dcgan/main.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

import pathkernel as pk

nz, ngf, ndf = 8, 8, 8


def weights_init(m):
    classname = m.__class__.__name__
    if classname.find("Conv") != -1:
        nn.init.normal_(m.weight, 0.0, 0.02)
    elif classname.find("BatchNorm") != -1:
        nn.init.normal_(m.weight, 1.0, 0.02)
        nn.init.zeros_(m.bias)


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 2, 2, 1, 0, bias=False),
            nn.BatchNorm2d(ngf * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf, 1, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, input):
        return self.main(input)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(1, ndf, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ndf * 2),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf * 2, 1, 2, 1, 0, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, input):
        return self.main(input).view(-1, 1).squeeze(1)


def main(epochs=3):
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    dataset = TensorDataset(images[:256], torch.tensor(labels[:256]))
    dataloader = DataLoader(dataset, batch_size=32, shuffle=True)

    netG = Generator()
    netG.apply(weights_init)
    netD = Discriminator()
    netD.apply(weights_init)
    criterion = nn.BCELoss()
    fixed_noise = torch.randn(4, nz, 1, 1)
    optimizerD = optim.Adam(netD.parameters(), lr=2e-3, betas=(0.5, 0.999))
    optimizerG = optim.Adam(netG.parameters(), lr=2e-3, betas=(0.5, 0.999))

    with pk.KernelRecorder(netD, optimizerD, data=dataset) as rec_d, pk.KernelRecorder(netG, optimizerG) as rec_g:
        for _ in range(epochs):
            for data in rec_d.track(dataloader, keep=True):
                # Update D network: maximize log(D(x)) + log(1 - D(G(z)))
                netD.zero_grad()
                real = data[0]
                batch_size = real.size(0)
                label = torch.full((batch_size,), 1.0)
                output = netD(real)
                errD_real = criterion(output, label)
                errD_real.backward()

                with rec_d.source("generated"), rec_g.source("noise"):
                    noise = torch.randn(batch_size, nz, 1, 1)
                    fake = netG(noise)
                    label.fill_(0.0)
                    output = netD(fake.detach())
                    errD_fake = criterion(output, label)
                    errD_fake.backward()
                    optimizerD.step()

                    # Update G network: maximize log(D(G(z)))
                    netG.zero_grad()
                    label.fill_(1.0)
                    output = netD(fake)
                    errG = criterion(output, label)
                    errG.backward()
                    optimizerG.step()
    return {netD: images[256:260], netG: fixed_noise}


if __name__ == "__main__":
    main()
