"""The optimizers of a training: Muon for matrices, AdamW for the rest."""
import torch


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, made orthogonal, for matrices. The updates of torch.optim.Muon
    with adjust_lr_fn="match_rms_adamw", but all matrices of a shape at once, and on a CPU in their own dtype:
    torch takes them one by one in bf16, 34 % of a toy step without bf16 hardware, where this takes 8 %."""

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, same in shapes.items():
                for p in same:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                grads, momenta = [p.grad for p in same], [self.state[p]["momentum_buffer"] for p in same]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
                updates = orthogonalize(torch.stack(nesterov)).unbind()
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(same, updates, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonalize(x, iterations=5):
    """The nearest semi-orthogonal matrix of each of x [n, A, B], roughly: Newton-Schulz, Muon's quintic."""
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT, iterations).mT
    y = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    y = y.bfloat16() if x.is_cuda else y  # a GPU multiplies it an order of magnitude faster than float32
    for _ in range(iterations):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), y, beta=3.4445)
    return y.to(x.dtype)


def make_optimizers(model, args, new=()):
    """Muon on the blocks' matrices where asked (AdamW's loss in a third of the steps), AdamW on the rest,
    with a rate of its own for those parameters whose names are `new` to a network that was trained before."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    new = set(new) if args.new_lr != args.adamw_lr else ()
    groups = {"muon": [], "adamw": [], "new": []}
    for name, p in trained.items():
        matrix = args.optimizer == "muon" and name.startswith("blocks.") and p.ndim == 2
        groups["muon" if matrix else "new" if name in new else "adamw"].append(p)
    rates = {"muon": args.muon_lr, "adamw": args.adamw_lr, "new": args.new_lr}
    groups = {kind: {"params": params, "lr": rates[kind], "peak_lr": rates[kind]}
              for kind, params in groups.items() if params}
    muon = groups.pop("muon", None)
    optimizers = [torch.optim.AdamW(list(groups.values()), betas=(0.9, 0.95), weight_decay=args.weight_decay,
                                    fused=True)]
    return optimizers + [Muon([muon], args.muon_lr, args.weight_decay)] if muon else optimizers
