// Arrays of any of the four types on the device, seen from the host as float64.
#pragma once
#include <random>
#include <string>
#include <vector>

#include "kernels/platform.cuh"
#include "options.h"

namespace lnc::standalone {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) refuse(std::string(what) + ": " + cudaGetErrorString(status));
}

inline double rounded(double x, DType t) {
  if (t == DType::f32) return static_cast<float>(x);
  if (t == DType::f16) return __half2float(__float2half_rn(static_cast<float>(x)));
  if (t == DType::bf16) return __bfloat162float(__float2bfloat16_rn(static_cast<float>(x)));
  return x;
}

using Values = std::vector<double>;

inline Values normal(uint64_t seed, int64_t count, double mean, double deviation, DType t) {
  std::mt19937_64 bits(seed);
  std::normal_distribution<double> distribution(mean, deviation);
  Values v(count);
  for (double& x : v) x = rounded(distribution(bits), t);
  return v;
}

// count elements that begin lead elements beyond what cudaMalloc returns, and end where the allocation does: whoever
// checks memory accesses sees an element too many.
class Array {
 public:
  // An output: every byte is 0xff, a NaN in each type, and so it must stay before the first element.
  Array(DType type, int64_t count, int64_t lead) : type_(type), count_(count), lead_(lead) {
    check(cudaMalloc(reinterpret_cast<void**>(&memory_), bytes()), "cudaMalloc");
    const std::vector<unsigned char> ones(bytes(), 0xff);
    check(cudaMemcpy(memory_, ones.data(), bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
  }

  Array(DType type, const Values& values, int64_t lead) : type_(type), count_(values.size()), lead_(lead) {
    check(cudaMalloc(reinterpret_cast<void**>(&memory_), bytes()), "cudaMalloc");
    std::vector<unsigned char> host(count_ * size_of(type_));
    for (int64_t i = 0; i < count_; ++i) {
      if (type_ == DType::f64) store(host, i, values[i]);
      if (type_ == DType::f32) store(host, i, static_cast<float>(values[i]));
      if (type_ == DType::f16) store(host, i, __float2half_rn(static_cast<float>(values[i])));
      if (type_ == DType::bf16) store(host, i, __float2bfloat16_rn(static_cast<float>(values[i])));
    }
    check(cudaMemcpy(data(), host.data(), host.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
  }

  Array(const Array&) = delete;
  ~Array() { cudaFree(memory_); }

  void* data() const { return memory_ + lead_ * size_of(type_); }

  Values values() const {
    const std::vector<unsigned char> host = download();
    Values v(count_);
    for (int64_t i = 0; i < count_; ++i) {
      if (type_ == DType::f64) v[i] = fetch<double>(host, i);
      if (type_ == DType::f32) v[i] = fetch<float>(host, i);
      if (type_ == DType::f16) v[i] = __half2float(fetch<__half>(host, i));
      if (type_ == DType::bf16) v[i] = __bfloat162float(fetch<__nv_bfloat16>(host, i));
    }
    return v;
  }

  bool written_before_its_beginning() const {
    const std::vector<unsigned char> host = download();
    for (int64_t i = 0; i < lead_ * size_of(type_); ++i)
      if (host[i] != 0xff) return true;
    return false;
  }

 private:
  size_t bytes() const { return (lead_ + count_) * size_of(type_); }

  template <class T>
  void store(std::vector<unsigned char>& host, int64_t i, T value) const {
    std::memcpy(host.data() + i * sizeof(T), &value, sizeof(T));
  }

  template <class T>
  T fetch(const std::vector<unsigned char>& host, int64_t i) const {
    T value;
    std::memcpy(&value, host.data() + (lead_ + i) * sizeof(T), sizeof(T));
    return value;
  }

  std::vector<unsigned char> download() const {
    std::vector<unsigned char> host(bytes());
    check(cudaMemcpy(host.data(), memory_, bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return host;
  }

  DType type_;
  int64_t count_, lead_;
  char* memory_ = nullptr;
};

}  // namespace lnc::standalone
