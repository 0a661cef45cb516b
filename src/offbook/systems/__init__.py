"""The ten systems: what each is, whose idea it was, and how far it has come here. A plain table; nothing registers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class System:
    """One system.

    Attributes:
        title: what people call it.
        summary: one sentence on what a user gets.
        paper: the paper's title.
        authors: its authors.
        venue: where it appeared.
        arxiv: its arXiv identifier.
        status: how far it has come here, in words.
        recipe: `"module:function"` of the reproduction, once there is one.
        commands: commands that use it today.
    """

    title: str
    summary: str
    paper: str
    authors: str
    venue: str
    arxiv: str
    status: str = "planned"
    recipe: str | None = None
    commands: tuple[str, ...] = ()


SYSTEMS: dict[str, System] = {
    "bpt": System(
        title="Blockwise transformer (BPT)",
        summary="A transformer that trains on far longer sequences in the same memory, with unchanged outputs.",
        paper="Blockwise Parallel Transformer for Large Context Models",
        authors="Liu, Abbeel",
        venue="NeurIPS 2023",
        arxiv="2305.19370",
        status="reproduced on a CPU; on a GPU not yet",
        recipe="offbook.systems.bpt.recipe:run",
        commands=("offbook context plan", "offbook context bench", "offbook context check", "offbook reproduce bpt"),
    ),
    "mtm": System(
        title="Masked trajectory models (MTM)",
        summary="One network that fills in hidden parts of trajectories: cloning, dynamics, planning, representation.",
        paper="Masked Trajectory Models for Prediction, Representation, and Control",
        authors="Wu, Majumdar, Stone, Lin, Mordatch, Abbeel, Rajeswaran",
        venue="ICML 2023",
        arxiv="2305.02968",
        status="recorded on a CPU: one model for all roles; the choice of masks does not hold",
        recipe="offbook.systems.mtm.recipe:run",
        commands=("offbook train mtm", "offbook evaluate", "offbook reproduce mtm"),
    ),
    "agentic_transformer": System(
        title="Agentic Transformer",
        summary="A policy that keeps its earlier trials in context and tries again, learnt from mixed episodes.",
        paper="Emergent Agentic Transformer from Chain of Hindsight Experience",
        authors="Liu, Abbeel",
        venue="ICML 2023",
        arxiv="2305.16554",
        status="recorded on a CPU: memory helps where the task hides something",
        recipe="offbook.systems.agentic_transformer.recipe:run",
        commands=(
            "offbook train agentic_transformer",
            "offbook train dt",
            "offbook evaluate",
            "offbook reproduce agentic_transformer",
        ),
    ),
    "viper": System(
        title="Video prediction rewards (VIPER)",
        summary="A reward function made of expert videos: the likelihood of the frames that an agent produces.",
        paper="Video Prediction Models as Rewards for Reinforcement Learning",
        authors="Escontrela, Adeniji, Yan, Jain, Peng, Goldberg, Lee, Hafner, Abbeel",
        venue="NeurIPS 2023",
        arxiv="2305.14343",
    ),
    "vcse": System(
        title="Value-conditional state entropy (VCSE)",
        summary="An exploration bonus that does not pull an agent away from the valuable states that it has found.",
        paper="Accelerating Reinforcement Learning with Value-Conditional State Entropy Exploration",
        authors="Kim, Shin, Abbeel, Seo",
        venue="NeurIPS 2023",
        arxiv="2305.19476",
        status="recorded on a CPU: ahead on grid worlds, no gain by values found; pictures not at full size",
        recipe="offbook.systems.vcse.recipe:run",
        commands=(
            "offbook explore check",
            "offbook explore bench",
            "offbook explore record",
            "offbook train drqv2",
            "offbook reproduce vcse",
        ),
    ),
    "dpok": System(
        title="Reinforcement fine-tuning of image generators (DPOK)",
        summary="Fine-tunes a text-to-image model on human preferences, held near the original by a KL term.",
        paper="DPOK: Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models",
        authors="Fan, Watkins, Du, Liu, Ryu, Boutilier, Abbeel, Ghavamzadeh, Lee, Lee",
        venue="NeurIPS 2023",
        arxiv="2305.16381",
    ),
    "video_adapter": System(
        title="Video Adapter",
        summary="Adapts a large frozen video model to a new domain by adding the scores of a small one.",
        paper="Probabilistic Adaptation of Text-to-Video Models",
        authors="Yang, Du, Dai, Schuurmans, Tenenbaum, Abbeel",
        venue="ICLR 2024",
        arxiv="2306.01872",
    ),
    "grasp_segmentation": System(
        title="Instance segmentation by grasping",
        summary="A segmentation model of your objects, learnt from a robot's own grasps instead of from labels.",
        paper="Self-Supervised Instance Segmentation by Grasping",
        authors="Liu, Chen, Abbeel",
        venue="arXiv 2023",
        arxiv="2305.06305",
    ),
    "model_imitation": System(
        title="Imitation audit",
        summary="Tells what imitating a stronger model buys, its facts or only its style, before you pay for it.",
        paper="The False Promise of Imitating Proprietary LLMs",
        authors="Gudibande, Wallace, Snell, Geng, Liu, Abbeel, Levine, Song",
        venue="ICLR 2024",
        arxiv="2305.15717",
    ),
    "toto": System(
        title="Train offline, test online (TOTO)",
        summary="An arena that runs blind, paired, seeded trials of submitted policies and ranks them with intervals.",
        paper="Train Offline, Test Online: A Real Robot Learning Benchmark",
        authors="Zhou, Dean, Srirama, Rajeswaran, Pari, Hatch, Jain, Yu, Abbeel, Pinto, Finn, Gupta",
        venue="ICRA 2023",
        arxiv="2306.00942",
        status="recorded on a CPU: policies lose where things are new; no robot has run it",
        recipe="offbook.systems.toto.recipe:run",
        commands=(
            "offbook demo",
            "offbook arena --help",
            "offbook policy --help",
            "offbook train encoder",
            "offbook train vinn",
            "offbook reproduce toto",
        ),
    ),
}
