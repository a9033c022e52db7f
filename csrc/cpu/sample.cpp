// The next token without a sort of the vocabulary. Probabilities stay unnormalised: the weight of a token is
// e^((logit - best) / temperature), in double. Weights and sums differ from the reference's in their last bits (about
// 1e-15 of the whole), so a token can differ where a random number, top-p or min-p falls that close to a border. A
// weight below e^-708 of the best counts as nothing.
#include "pyruntime/sample.h"

#include "cpu/parallel.h"
#include "vec.h"
#include "weights.h"

namespace pyruntime::PYRUNTIME_ISA_NAMESPACE {
namespace {

// Ids and distances of the tokens that are no farther than `farthest`; how many they are.
int64_t gather(const float* row, int64_t size, Scale scale, double farthest, const SampleScratch& scratch) {
    int64_t found = 0;
    double distances[kSampleBlock];
    for (int64_t begin = 0; begin < size; begin += kSampleBlock) {
        if (distance(scratch.block_best[begin / kSampleBlock], scale) > farthest) {
            continue;
        }
        const int64_t count = smaller(size - begin, kSampleBlock);
        measure(row + begin, count, scale, distances);
        for (int64_t i = 0; i < count; ++i) {
            scratch.ids[found] = static_cast<int32_t>(begin + i);
            scratch.distances[found] = distances[i];
            found += distances[i] <= farthest ? 1 : 0;
        }
    }
    return found;
}

// A distance within which the `count` best surely are: that of the block that is `count`th by its best value.
double reach_of(int64_t count, int64_t vocab, Scale scale, const SampleScratch& scratch) {
    const int64_t blocks = num_blocks(vocab);
    if (count > blocks) {
        return INFINITY;
    }
    measure(scratch.block_best, blocks, scale, scratch.distances);
    const uint64_t key = find_border(scratch.distances, 0, nullptr, blocks, static_cast<double>(count)).key;
    double reach;
    __builtin_memcpy(&reach, &key, sizeof reach);
    return reach;
}

double add_up(const double* values, int64_t count) {
    double total = 0.0;
    for (int64_t i = 0; i < count; ++i) {
        total += values[i];
    }
    return total;
}

// The top_k best of the gathered tokens and the equals of the last one.
int64_t keep_top_k(int64_t top_k, int64_t count, const SampleScratch& scratch) {
    if (top_k >= count) {
        return count;
    }
    const uint64_t key = find_border(scratch.distances, 0, nullptr, count, static_cast<double>(top_k)).key;
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
        scratch.ids[kept] = scratch.ids[i];
        scratch.distances[kept] = scratch.distances[i];
        kept += bits_of(scratch.distances[i]) <= key ? 1 : 0;
    }
    return kept;
}

int64_t keep_min_p(double min_p, int64_t count, const SampleScratch& scratch) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
        scratch.ids[kept] = scratch.ids[i];
        scratch.weights[kept] = scratch.weights[i];
        kept += scratch.weights[i] >= min_p ? 1 : 0;
    }
    return kept;
}

// The fewest best, lower ids first among equals, whose weights reach `target`.
int64_t keep_top_p(double target, int64_t count, const SampleScratch& scratch) {
    const uint64_t flip = ~uint64_t{0};  // the greatest weight first
    const Border border = find_border(scratch.weights, flip, scratch.weights, count, target);
    double passed = border.before;
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
        const double weight = scratch.weights[i];
        const uint64_t key = bits_of(weight) ^ flip;
        bool keep = key < border.key;
        // the best is kept whatever top_p is: nothing comes before it
        if (key == border.key && (passed < target || passed == 0.0)) {
            passed += weight;
            keep = true;
        }
        scratch.ids[kept] = scratch.ids[i];
        scratch.weights[kept] = weight;
        kept += keep ? 1 : 0;
    }
    return kept;
}

// The tokens that may be drawn: their ids and weights in the scratch memory, and how many they are.
int64_t keep(const SampleRow& request, const float* row, int64_t vocab, Scale scale, const SampleScratch& scratch) {
    const bool by_rank = request.top_k > 0 && request.top_k < vocab;
    double farthest = kFarthest;
    if (request.min_p > 0.0) {
        // a little beyond the border, which is judged on the weights
        const double reach = 1e-9 - log(request.min_p);
        farthest = reach < farthest ? reach : farthest;
    }
    if (by_rank) {
        const double reach = reach_of(request.top_k, vocab, scale, scratch);
        farthest = reach < farthest ? reach : farthest;
    }
    if (by_rank || request.min_p > 0.0) {
        int64_t count = gather(row, vocab, scale, farthest, scratch);
        count = by_rank ? keep_top_k(request.top_k, count, scratch) : count;
        weigh(scratch.distances, count, scratch.weights);
        count = request.min_p > 0.0 ? keep_min_p(request.min_p, count, scratch) : count;
        const double target = request.top_p * add_up(scratch.weights, count);
        return request.top_p < 1.0 ? keep_top_p(target, count, scratch) : count;
    }
    // top-p alone: the tokens near the best usually reach the target, so the others are summed but not gathered
    const double target = request.top_p * sum_weights(row, vocab, scale, scratch.block_sums);
    int64_t count = 0;
    for (double near = 4.0; near < 2.0 * kFarthest; near *= 2.0) {
        count = gather(row, vocab, scale, near < kFarthest ? near : kFarthest, scratch);
        weigh(scratch.distances, count, scratch.weights);
        if (add_up(scratch.weights, count) >= target) {
            break;
        }
    }
    return keep_top_p(target, count, scratch);
}

// Inverse of the cumulative distribution in the order of the ids, over the kept tokens.
int64_t draw_kept(double uniform, int64_t count, const SampleScratch& scratch) {
    const double target = uniform * add_up(scratch.weights, count);
    double sum = 0.0;
    int64_t last = 0;
    for (int64_t i = 0; i < count && sum <= target; ++i) {
        sum += scratch.weights[i];
        last = i;
    }
    return scratch.ids[last];
}

// The same over all tokens: first the block, then the token.
int64_t draw_any(double uniform, const float* row, int64_t vocab, Scale scale, const SampleScratch& scratch) {
    const double target = uniform * sum_weights(row, vocab, scale, scratch.block_sums);
    double sum = 0.0;
    int64_t block = 0;
    while (block + 1 < num_blocks(vocab) && sum + scratch.block_sums[block] <= target) {
        sum += scratch.block_sums[block++];
    }
    const int64_t begin = block * kSampleBlock;
    double weights[kSampleBlock];
    weigh_block(row + begin, vocab - begin, scale, weights);
    int64_t last = 0;
    for (int64_t i = 0; i < kSampleBlock && sum <= target; ++i) {
        // where rounding leaves the sum below the block's own, the last token that has a weight is drawn
        last = weights[i] > 0.0 ? i : last;
        sum += weights[i];
    }
    return begin + last;
}

int64_t draw(const SampleRow& request, const float* row, float best, int64_t vocab, const SampleScratch& scratch) {
    const Scale scale = {best, request.temperature};
    const bool by_rank = request.top_k > 0 && request.top_k < vocab;
    if (!by_rank && request.min_p <= 0.0 && request.top_p >= 1.0) {
        return draw_any(request.uniform, row, vocab, scale, scratch);
    }
    return draw_kept(request.uniform, keep(request, row, vocab, scale, scratch), scratch);
}

bool changes_logits(const SampleRow& request) {
    return request.allowed.ids != nullptr || request.biased.count > 0 || request.banned.count > 0 ||
           request.repetition != 1.0f || request.presence != 0.0f || request.frequency != 0.0f;
}

void apply_masks(const SampleRow& request, int64_t vocab, float* row) {
    if (request.allowed.ids == nullptr) {
        __builtin_memcpy(row, request.logits, static_cast<uint64_t>(vocab) * sizeof(float));
    } else {
        for (int64_t i = 0; i < vocab; ++i) {
            row[i] = -INFINITY;
        }
        for (int64_t i = 0; i < request.allowed.count; ++i) {
            row[request.allowed.ids[i]] = request.logits[request.allowed.ids[i]];
        }
    }
    for (int64_t i = 0; i < request.biased.count; ++i) {
        row[request.biased.ids[i]] += request.bias[i];
    }
    for (int64_t i = 0; i < request.banned.count; ++i) {
        row[request.banned.ids[i]] = -INFINITY;
    }
}

// `marks` [vocab] need not hold anything sensible before.
void apply_penalties(const SampleRow& request, float* row, int32_t* marks) {
    const TokenIds histories[] = {request.prompt, request.output};
    for (const TokenIds& history : histories) {
        for (int64_t i = 0; i < history.count; ++i) {
            marks[history.ids[i]] = -1;
        }
    }
    for (const TokenIds& history : histories) {
        for (int64_t i = 0; i < history.count; ++i) {
            const int32_t id = history.ids[i];
            if (marks[id] < 0 && request.repetition != 1.0f) {
                row[id] = row[id] > 0.0f ? row[id] / request.repetition : row[id] * request.repetition;
            }
            marks[id] = 0;
        }
    }
    for (int64_t i = 0; i < request.output.count; ++i) {
        ++marks[request.output.ids[i]];
    }
    for (int64_t i = 0; i < request.output.count; ++i) {
        const int32_t id = request.output.ids[i];
        if (marks[id] > 0) {
            // exact in double, then rounded once: as a float product this would be fused into the subtraction
            row[id] -= static_cast<float>(static_cast<double>(request.frequency) * marks[id]);
            row[id] -= request.presence;
        }
        marks[id] = 0;
    }
}

// The greater the logit, the smaller its key; the two zeros have the same.
uint64_t falling_key(float logit) {
    const float value = logit + 0.0f;  // -0 becomes 0
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return (bits >> 31) != 0 ? bits : 0x7fffffffu - bits;
}

// The ids and values of the num_top best raw logits, lower ids first among equals.
void list_best(const SampleRow& request, int64_t vocab, Scale raw, const SampleScratch& scratch) {
    const int64_t wanted = smaller(request.num_top, vocab);
    const int64_t count = gather(request.logits, vocab, raw, reach_of(wanted, vocab, raw, scratch), scratch);
    // a distance can be the same for two logits; their own order is that of these keys
    for (int64_t i = 0; i < count; ++i) {
        const uint64_t key = falling_key(request.logits[scratch.ids[i]]);
        __builtin_memcpy(scratch.distances + i, &key, sizeof key);
    }
    const Border border = find_border(scratch.distances, 0, nullptr, count, static_cast<double>(wanted));
    int64_t equals = wanted - static_cast<int64_t>(border.before);
    int64_t listed = 0;
    for (int64_t i = 0; i < count && listed < wanted; ++i) {
        const uint64_t key = bits_of(scratch.distances[i]);
        if (key < border.key || (key == border.key && equals-- > 0)) {
            request.top_ids[listed] = scratch.ids[i];
            request.top_values[listed] = request.logits[scratch.ids[i]];
            ++listed;
        }
    }
}

// Log-probability and rank of the token among the raw logits, whose best values are in the scratch memory.
void score(SampleRow& request, int64_t vocab, float best, const SampleScratch& scratch) {
    const Scale raw = {best, 1.0};
    request.log_sum = raw.best + log(sum_weights(request.logits, vocab, raw, scratch.block_sums));
    request.value = request.logits[request.token];
    request.rank = 1 + count_greater(request.logits, vocab, request.value);
    if (request.num_top > 0) {
        list_best(request, vocab, raw, scratch);
    }
}

int32_t status_of(Best best) {
    if (best.nan) {
        return kHasNan;
    }
    if (best.value == INFINITY) {
        return kHasInfinity;
    }
    return best.value == -INFINITY ? kNothingFinite : kSampled;
}

int32_t status_after_penalties(Best best) {
    switch (status_of(best)) {
        case kHasNan:
            return kNanAfterPenalties;
        case kHasInfinity:
            return kInfinityAfterPenalties;
        case kNothingFinite:
            return kMasksLeaveNothing;
        default:
            return kSampled;
    }
}

void sample_row(SampleRow& request, int64_t vocab, const SampleScratch& scratch) {
    const Best raw = scan(request.logits, vocab, scratch.block_best);
    request.status = status_of(raw);
    request.token = request.given;
    if (request.status != kSampled) {
        return;
    }
    if (request.given < 0) {
        const bool changed = changes_logits(request);
        const float* row = request.logits;
        Best best = raw;
        if (changed) {
            apply_masks(request, vocab, scratch.row);
            apply_penalties(request, scratch.row, scratch.ids);
            row = scratch.row;
            best = scan(row, vocab, scratch.block_best);
            request.status = status_after_penalties(best);
            if (request.status != kSampled) {
                return;
            }
        }
        request.token = request.temperature == 0.0 ? first_equal(row, best.value, scratch.block_best)
                                                   : draw(request, row, best.value, vocab, scratch);
        if (changed && request.num_top > 0) {
            scan(request.logits, vocab, scratch.block_best);
        }
    }
    if (request.num_top >= 0) {
        score(request, vocab, raw.value, scratch);
    }
}

}  // namespace

void sample(const SampleParams& params, const Worker& worker) {
    int64_t begin, end;
    while (take(worker, params.num_rows, 1, &begin, &end)) {
        for (int64_t i = begin; i < end; ++i) {
            sample_row(params.rows[i], params.vocab, params.scratch[worker.index]);
        }
    }
    wait_for_all(worker);
}

}  // namespace pyruntime::PYRUNTIME_ISA_NAMESPACE
