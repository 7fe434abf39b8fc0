"""Policy gradient with dropout on a cart-pole, in the manner of pytorch/examples, reinforcement_learning/reinforce.py.

https://github.com/pytorch/examples/blob/main/reinforcement_learning/reinforce.py
"""

import math
import random
from collections import deque

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.distributions import Categorical

import pathkernel as pk

gamma = 0.99


class CartPole:
    """The pole of Barto, Sutton and Anderson (1983), by Euler's method."""

    def reset(self):
        self.state = [random.uniform(-0.05, 0.05) for _ in range(4)]
        return self.state

    def step(self, action):
        x, speed, angle, turn = self.state
        force = 10.0 if action == 1 else -10.0
        pushed = (force + 0.05 * turn**2 * math.sin(angle)) / 1.1
        length = 0.5 * (4 / 3 - 0.1 * math.cos(angle) ** 2 / 1.1)
        turning = (9.8 * math.sin(angle) - math.cos(angle) * pushed) / length
        pushing = pushed - 0.05 * turning * math.cos(angle) / 1.1
        self.state = [x + 0.02 * speed, speed + 0.02 * pushing, angle + 0.02 * turn, turn + 0.02 * turning]
        done = abs(self.state[0]) > 2.4 or abs(self.state[2]) > 0.2095
        return self.state, 1.0, done


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.affine1 = nn.Linear(4, 24)
        self.dropout = nn.Dropout(p=0.6)
        self.affine2 = nn.Linear(24, 2)
        self.saved_log_probs = []
        self.rewards = []

    def forward(self, x):
        x = self.affine1(x)
        x = self.dropout(x)
        x = F.relu(x)
        action_scores = self.affine2(x)
        return F.softmax(action_scores, dim=1)


def select_action(policy, state):
    state = torch.tensor(state).unsqueeze(0)
    probs = policy(state)
    m = Categorical(probs)
    action = m.sample()
    policy.saved_log_probs.append(m.log_prob(action))
    return action.item()


def finish_episode(policy, optimizer):
    R = 0
    policy_loss = []
    returns = deque()
    for r in policy.rewards[::-1]:
        R = r + gamma * R
        returns.appendleft(R)
    returns = torch.tensor(returns)
    returns = (returns - returns.mean()) / (returns.std() + 1e-7)
    for log_prob, R in zip(policy.saved_log_probs, returns, strict=True):
        policy_loss.append(-log_prob * R)
    optimizer.zero_grad()
    policy_loss = torch.cat(policy_loss).sum()
    policy_loss.backward()
    optimizer.step()
    del policy.rewards[:]
    del policy.saved_log_probs[:]


def main(episodes=16):
    torch.manual_seed(543)
    random.seed(543)
    env = CartPole()
    policy = Policy()
    optimizer = optim.Adam(policy.parameters(), lr=1e-2)
    with pk.KernelRecorder(policy, optimizer, task="regression") as recorder, recorder.source("states"):
        for _ in range(episodes):
            state = env.reset()
            for _ in range(1, 40):  # an episode does not go on forever
                action = select_action(policy, state)
                state, reward, done = env.step(action)
                policy.rewards.append(reward)
                if done:
                    break
            finish_episode(policy, optimizer)
    return {policy: torch.tensor([env.reset() for _ in range(4)])}


if __name__ == "__main__":
    main()
