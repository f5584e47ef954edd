"""Data, optimizer, schedule and training of the authors' recipe on COCO, 1x and 3x."""

from detectron2.config import LazyCall as L
from torch.optim import AdamW

from spatial_mamba_d2.detection.lazy import (
    build_evaluator,
    build_step_schedule,
    build_test_loader,
    build_train_loader,
)
from spatial_mamba_d2.models.param_groups import layered_groups

COCO = "datasets/coco"
dataloader = dict(
    data=dict(
        recipe="mask_rcnn_spatial_mamba_t",  # the YAML recipe by which data are read
        train_json=f"{COCO}/annotations/instances_train2017.json",
        train_images=f"{COCO}/train2017",
        test_json=f"{COCO}/annotations/instances_val2017.json",
        test_images=f"{COCO}/val2017",
        num_classes="${model.roi_heads.num_classes}",
        overrides=[],  # KEY, VALUE, ... of that recipe
    ),
    train=L(build_train_loader)(
        data="${dataloader.data}", batch_size=16, num_workers=4, seed="${train.seed}"
    ),
    test=L(build_test_loader)(data="${dataloader.data}", num_workers=4),
    evaluator=L(build_evaluator)(data="${dataloader.data}", output_dir="${train.output_dir}"),
)
optimizer = L(AdamW)(
    params=L(layered_groups)(
        model=None,  # the trainer sets it
        base_lr="${optimizer.lr}",
        weight_decay=0.05,
        layer_decay=1.0,
    ),
    lr=0.0001,
    betas=(0.9, 0.999),
    fused=True,  # on CPUs and NVIDIA's GPUs
)
# 117,266 images with objects / 16 = 7,330 iterations per epoch
train = dict(
    output_dir="output/lazy",
    init_checkpoint="",
    max_iter=87960,
    amp=dict(enabled=False),  # bfloat16
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    checkpointer=dict(period=7330, max_to_keep=100),
    eval_period=7330,
    log_period=20,
    clip_norm=0.0,  # above 0: bound on the norm of all gradients together
    seed=0,
    device="cuda",
)
# The learning rate falls to a tenth at each step, after a warmup
lr_multiplier = L(build_step_schedule)(
    max_iter="${train.max_iter}", steps=[58640, 80630], warmup_iters=1000, warmup_factor=0.001
)
