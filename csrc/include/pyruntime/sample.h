// The choice of the next token from rows of logits. pyruntime/ops/sample.py says what the result must be.
#pragma once

#include <cstdint>

namespace pyruntime {

// Logits are looked at in blocks of this size: the best value of a block tells whether it can be skipped.
constexpr std::int64_t kSampleBlock = 256;

enum SampleStatus : std::int32_t {
    kSampled = 0,
    kHasNan = 1,
    kHasInfinity = 2,  // +inf; -inf is an ordinary mask
    kNothingFinite = 3,
    kMasksLeaveNothing = 4,
    kNanAfterPenalties = 5,
    kInfinityAfterPenalties = 6,
};

// token ids in [0, vocab), in any order, repeats allowed
struct TokenIds {
    const std::int32_t* ids;
    std::int64_t count;
};

// What one row asks for, and where its results go. The logits are only read. The history (prompt and output) is needed
// only where one of the penalties is in force: repetition other than 1, presence or frequency other than 0.
struct SampleRow {
    const float* logits;  // [vocab]
    TokenIds allowed;     // every id where `ids` is null
    TokenIds biased;
    const float* bias;  // [biased.count]
    TokenIds banned;
    TokenIds prompt, output;
    float repetition, presence, frequency;
    double temperature;    // 0 is greedy
    double min_p;          // 0 is none
    double top_p;          // 1 and more is none
    double uniform;        // the random number of a draw, in [0, 1)
    std::int64_t top_k;    // 0 and less is none
    std::int64_t given;    // a token that is only scored, or -1
    std::int64_t num_top;  // how many of the best are asked for; -1 for no log-probability at all

    std::int32_t status;  // SampleStatus; nothing below is set unless it is kSampled
    std::int64_t token;
    // the rest is about the raw logits, and only set where num_top >= 0
    double log_sum;         // log of the sum of e^logit
    float value;            // the token's logit
    std::int64_t rank;      // 1 + number of greater logits
    std::int32_t* top_ids;  // [min(num_top, vocab)], in rising order, not by value
    float* top_values;      // [min(num_top, vocab)]
};

// Memory of one worker.
struct SampleScratch {
    float* block_best;   // [blocks]
    double* block_sums;  // [blocks]
    float* row;          // [vocab], logits after masks and penalties
    std::int32_t* ids;   // [vocab], the tokens that can still be drawn, in rising order
    double* distances;   // [vocab], (best logit - logit) / temperature of each
    double* weights;     // [vocab], e^-distance of each
};

struct SampleParams {
    SampleRow* rows;
    std::int64_t num_rows;
    std::int64_t vocab;            // at least 1
    const SampleScratch* scratch;  // one per worker
};

}  // namespace pyruntime
