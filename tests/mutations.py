"""Do the tests notice a wrong formula? Flips a sign, a constant or a comparison in many formulas, one at a time.

    python tests/mutations.py             # all: about ten minutes on one core
    python tests/mutations.py simsiam     # those whose name contains a word

Each mutation is made in a copy of the checkout, and its tests are run there until the first failure. A mutation that
no test notices is printed as MISSED, and the exit status is then 1. The text to replace has to stand exactly once in
the package: after a change of a formula its row follows.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# name, text, what it becomes, files of tests that have to notice it
MUTATIONS = [
    ("nt_xent_cosine_sign", "loss = all_lse.mean() - cosine / temperature", "loss = all_lse.mean() + cosine / temperature", "test_nt_xent"),
    ("nt_xent_gradient_constant", "pull = 2 / (views - 1)", "pull = 1 / (views - 1)", "test_nt_xent"),
    ("nt_xent_positives", "return -log_p[positive].mean()", "return -log_p[itself].mean()", "test_nt_xent"),
    ("info_nce_diagonal", "return logits.logsumexp(1) - logits.diagonal()", "return logits.logsumexp(0) - logits.diagonal()", "test_info_nce test_rows test_moco_v3"),
    ("dcl_weight_constant", "return 2 - z.shape[1] * ((rows", "return 1 - z.shape[1] * ((rows", "test_dcl"),
    ("variance_hinge_sign", "return (target - (variance + eps).sqrt()).relu().mean()", "return (target + (variance + eps).sqrt()).relu().mean()", "test_vicreg test_covariance test_vicreg_terms"),
    ("covariance_divisor", "off_diagonal_energy(centred[0]) / ((n - 1).square() * z.shape[1])", "off_diagonal_energy(centred[0]) / (n.square() * z.shape[1])", "test_vicreg test_covariance"),
    ("barlow_target", "return (diagonal - 1).square().sum(), off_diagonal_energy(a, b)", "return (diagonal - 0.5).square().sum(), off_diagonal_energy(a, b)", "test_barlow_twins"),
    ("sinkhorn_epsilon", "own = at_least_float32(scores) / epsilon", "own = at_least_float32(scores) * epsilon", "test_assignments test_swav"),
    ("entropy_sign", "return eigenvalues.pow(alpha).sum().log() / (1 - alpha)", "return eigenvalues.pow(alpha).sum().log() / (alpha - 1)", "test_distributions test_information"),
    ("information_scale", "_entropy(len(a) * k_h * k_z, alpha)", "_entropy(k_h * k_z, alpha)", "test_distributions test_information"),
    ("wasserstein_constant", "- 2 / dim**0.5 * root_trace", "- 1 / dim**0.5 * root_trace", "test_distributions test_wasserstein"),
    ("sigreg_window", "gaussian = (-t.square() / 2).exp()", "gaussian = (-t.square()).exp()", "test_distributions test_lejepa test_sigreg_term"),
    ("uniformity_pairs", "math.log(count * (count - 1) / 2)", "math.log(count * (count - 1))", "test_spread test_distributions test_align_uniform"),
    ("simsiam_stop_gradient", "cross_view_cosines(prediction, z[:2].detach())", "cross_view_cosines(prediction, z[:2])", "test_simsiam"),
    ("zero_cl_target", "return ((a * b).mean(0) - 1).square().sum()", "return ((a * b).mean(0) + 1).square().sum()", "test_zero_cl"),
    ("koleo_sign", "return -(distance + eps).log().mean()", "return (distance + eps).log().mean()", "test_koleo"),
    ("koleo_self", "nearest = similarity.fill_diagonal_(-torch.inf).argmax(1)", "nearest = similarity.argmax(1)", "test_koleo"),
    ("sparsity_schedule", "return target * (1 - (1 - done) ** 3)", "return target * (1 - (1 - done) ** 2)", "test_sparsity_target"),
    ("sparsity_never_all", "count = min(math.ceil(share * n - 1e-9), n - 1)", "count = math.ceil(share * n - 1e-9)", "test_sparsity_target"),
    ("sparsity_held", "held = progress >= _END", "held = False", "test_sparsity_target"),
    ("weight_by_target", "change = self.rate * excess +", "change = -self.rate * excess +", "test_weight_by_target"),
    ("set_point_penalty", "self._weight + math.exp(self._log) * self._excess", "self._weight - math.exp(self._log) * self._excess", "test_weight_by_target"),
    ("shrink_comparison", "torch.where(norms > threshold, 1 - threshold / norms, 0)", "torch.where(norms > threshold / 2, 1 - threshold / norms, 0)", "test_sparse_head"),
    ("rankme_epsilon", "math.exp(torch.special.entr(weights / total + eps).sum().item())", "math.exp(torch.special.entr(weights / total - eps).sum().item())", "test_spectrum test_table test_spectrum_state"),
    ("numerical_rank_comparison", "return int((sigma > tol * sigma[0]).sum())", "return int((sigma < tol * sigma[0]).sum())", "test_spectrum"),
    ("alpha_req_weights", "x, weights = ranks.log(), 1 / ranks", "x, weights = ranks.log(), ranks", "test_spectrum_decay"),
    ("lidar_within", "variance = sigma.square() / (objects * (self.views - 1)) + ridge", "variance = sigma.square() / (objects * self.views) + ridge", "test_lidar test_discriminant"),
    ("hessian_part", "return EffectiveHessian(G_L + M, G_L, M", "return EffectiveHessian(G_L - M, G_L, M", "test_hessian"),
    ("negative_comparison", "return (eigenvalues < -_NEGATIVE * eigenvalues", "return (eigenvalues > -_NEGATIVE * eigenvalues", "test_hessian test_collapse_claims"),
    ("pullback_order", "return self.J.mT @ self.J", "return self.J @ self.J.mT", "test_pullback"),
    ("reweight_exponent", "return (kappa ** -torch.arange(dim, dtype=torch.float64)).float()", "return (kappa ** -(torch.arange(dim, dtype=torch.float64) + 1)).float()", "test_reweight"),
    ("batch_norm_unbiased", "unbiased = var * (n / (n - 1))", "unbiased = var * ((n - 1) / n)", "test_norm"),
    ("ema_cosine", "(1 + math.cos(math.pi * progress)) / 2", "(2 - 2 * progress) / 2", "test_ema"),
    ("ema_ends", "return self.end - (self.end - self.start)", "return self.start - (self.end - self.start)", "test_ema"),
    ("collapse_limit_looser", '"rankme_h": 0.5', '"rankme_h": 0.2', "test_collapse"),
    ("collapse_limit_tighter", '"rankme_h": 0.5', '"rankme_h": 0.8', "test_collapse"),
    ("cross_entropy_labels", "rows, label = rows[label >= 0], label[label >= 0]", "rows, label = rows[label >= 0], label[label >= 0].roll(1)", "test_cross_entropy"),
    ("judging_freedom", "free = len(values) - 1", "free = len(values)", "test_judging"),
    ("judging_missing_seed", "if not values or values < made", "if not values", "test_judging"),
    ("judging_images", "np.var(answers, ddof=1) / len(answers)", "np.var(answers, ddof=1)", "test_judging"),
    ("judging_satterthwaite", "freedom = sum(variance**2 / free for variance, free in variances)", "freedom = sum(variance / free for variance, free in variances)", "test_judging"),
    ("judging_margin", "return HOLDS if low > margin else FAILS if high < margin else UNCLEAR", "return HOLDS if low > margin else FAILS if high < 0 else UNCLEAR", "test_judging"),
    ("judging_trend", "ranks = np.arange(len(along)) - (len(along) - 1) / 2", "ranks = np.arange(len(along)) - len(along) / 2", "test_judging"),
    ("run_key", "hashlib.blake2b(text.encode(), digest_size=6)", "hashlib.blake2b(text[:40].encode(), digest_size=6)", "test_studies_run"),
    ("trust_gradient_check", "missing = [name for name, p in trained.items() if p.grad is None]", "missing = [name for name, p in trained.items() if p is None]", "test_gradients"),
    ("trust_other_weights", 'if found.refused and config.backbone_check != "warn":', 'if found.refused and config.backbone_check == "error?":', "test_belonging"),
    ("trust_same_weights", "SAME = 1e-9", "SAME = 1e-2", "test_fingerprint test_belonging"),
    ("trust_acting_modules", "return set(found[1])", "return set(n.rpartition('.')[0] for n in found[0])", "test_dependence"),
    ("trust_feeding", "return [name for name in bare_tensors(backbone) if name in found[0]]", "return list(bare_tensors(backbone))", "test_dependence test_reading"),
    ("trust_last_token", "f.shape[1] - 1 - mask.flip(1).ne(0).int().argmax(1)", "f.shape[1] - 1 - mask.ne(0).int().argmax(1)", "test_reading"),
    ("trust_left_padding", "torch.where(order < length, order, order - length)", "torch.arange(length).expand_as(order)", "test_reading"),
    ("trust_negative_variance", 'if last == "running_var" and bool(low < 0):', 'if last == "running_var" and bool(low < -1e9):', "test_soundness"),
    ("trust_reading_resumed", '"layer", "reading", "trainable")', '"layer", "trainable")', "test_resume"),
    ("trust_unlabelled", "kept = labels != UNLABELLED\n    if not", "kept = labels != -9\n    if not", "test_unmeasured test_unlabelled"),
    ("trust_one_class", "if len(classes) < 2:", "if len(classes) < 1:", "test_unmeasured test_unlabelled"),
    ("trust_exif", "if image.getexif().get(_ORIENTATION, 1) != 1 else image", "if image.getexif().get(_ORIENTATION, 1) == 1 else image", "test_pixels"),
    ("trust_share_limit", "LEAST = 1e-4", "LEAST = 1e-9", "test_shares"),
    ("trust_rounding", "return rounding_of(eps) * spread if eps > EPS else 0.0", "return 0.0", "test_input_dtype"),
    ("interval_side", '"better" if low > 0', '"better" if high > 0', "test_verdicts test_verdict"),
]  # fmt: skip


def source_of(text: str, package: Path) -> Path:
    """Return the one file that holds a text."""
    found = [f for f in sorted(package.rglob("*.py")) if text in f.read_text(encoding="utf-8")]
    if len(found) != 1 or found[0].read_text(encoding="utf-8").count(text) != 1:
        raise SystemExit(f"Expected {text!r} once in the package, found it in {[str(f) for f in found]}.")
    return found[0]


def run(tests: list[str], copy: Path) -> bool:
    """Return whether the tests pass in the copy."""
    files = [str(f) for name in tests for f in sorted((copy / "tests").rglob(f"{name}.py"))]
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *files]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True).returncode == 0


def main(words: list[str]) -> int:
    """Make every mutation whose name holds one of the words, or all, and return the number that nothing noticed."""
    chosen = [row for row in MUTATIONS if not words or any(word in row[0] for word in words)]
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", ".ci-venv", "runs", "__pycache__"))
        for name, text, mutated, tests in chosen:
            file = source_of(text, copy / "hfproj")
            original = file.read_text(encoding="utf-8")
            file.write_text(original.replace(text, mutated), encoding="utf-8")
            passed = run(tests.split(), copy)
            file.write_text(original, encoding="utf-8")
            missed += [name] * passed
            print(f"{'MISSED' if passed else 'caught'}  {name}", flush=True)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught")
    return len(missed)


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
