"""Programs beside the package: conversion, scoring, faults on purpose, and benchmarks/."""
